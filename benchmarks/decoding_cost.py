"""Compare the estimated cost of decoding an image with the CPU time that it takes.

    python benchmarks/decoding_cost.py [--edge 2400]

Decodes photo-like images in every supported format, with the options that change the work. For each image it prints the
estimate, the fastest of three runs and their ratio; at the end, the range of the ratios.
"""

import argparse
import io
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the test images

from detr.image_processing.decode import decode_cost, decode_image
from tests.raydetr.serving.costly import interlaced_png, progressive_jpeg


def photo(edge: int) -> Image.Image:
    """Make an image of smooth areas with noise, 4:3."""
    generator = np.random.default_rng(0)
    small = Image.fromarray(generator.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((edge * 4 // 3, edge), Image.Resampling.BICUBIC), np.int16)
    return Image.fromarray((smooth + generator.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8))


def files(edge: int) -> dict[str, bytes]:
    """Encode the image in each format; return the files by name."""
    image = photo(edge)
    cases: dict[str, tuple[str, str, dict[str, Any]]] = {
        "JPEG 4:2:0": ("RGB", "JPEG", {"quality": 85}),
        "JPEG 4:4:4": ("RGB", "JPEG", {"quality": 95, "subsampling": 0}),
        "JPEG progressive 4:2:0": ("RGB", "JPEG", {"quality": 85, "progressive": True}),
        "JPEG progressive 4:4:4": ("RGB", "JPEG", {"quality": 95, "subsampling": 0, "progressive": True}),
        "JPEG gray": ("L", "JPEG", {"quality": 85}),
        "JPEG CMYK": ("CMYK", "JPEG", {"quality": 85}),
        "PNG RGB": ("RGB", "PNG", {}),
        "PNG RGBA": ("RGBA", "PNG", {}),
        "PNG palette": ("P", "PNG", {}),
        "PNG gray": ("L", "PNG", {}),
        "WebP lossy": ("RGB", "WEBP", {"quality": 80, "method": 0}),
        "WebP lossless": ("RGB", "WEBP", {"lossless": True, "method": 0}),
        "GIF": ("P", "GIF", {}),
        "TIFF LZW": ("RGB", "TIFF", {"compression": "tiff_lzw"}),
        "TIFF raw": ("RGB", "TIFF", {}),
        "BMP": ("RGB", "BMP", {}),
        "PPM": ("RGB", "PPM", {}),
    }
    size = image.height, image.width
    encoded = {"JPEG of 60 scans": progressive_jpeg(*size, 60), "PNG interlaced": interlaced_png(*size)}
    for name, (mode, form, options) in cases.items():
        stream = io.BytesIO()
        image.convert(mode).save(stream, form, **options)
        encoded[name] = stream.getvalue()
    return encoded


def seconds(data: bytes) -> float:
    """Measure the CPU time of decoding: the minimum of three runs."""
    times = []
    for _ in range(3):
        start = time.process_time()
        decode_image(data, max_cost=1000)
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--edge", type=int, default=2400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ratios = []
    print("| file | kB | estimate, s | measured, s | ratio |\n|---|---|---|---|---|")
    for name, data in files(options.edge).items():
        estimate, measured = decode_cost(data), seconds(data)
        ratios.append(estimate / measured)
        print(f"| {name} | {len(data) / 1000:,.0f} | {estimate:.3f} | {measured:.3f} | {ratios[-1]:.2f} |")
    print(f"\nestimate / measured: {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
