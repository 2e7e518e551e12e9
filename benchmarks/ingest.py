"""Measure the speed of ingest, and the driver's peak memory as the data set grows.

    python benchmarks/ingest.py

Speed, in MB and images per second, is measured on coco128's images, copied to 1,024 files with different ids. Memory is
measured on 5,000, 20,000 and 80,000 tiny images with seven objects each, in a new process for each size.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image
from shards_of_coco128 import SOURCE

WORK = Path("runs/benchmarks/ingest")


def main() -> None:
    """Print both tables."""
    print("| images | MB | seconds | images/s | MB/s |\n|---|---|---|---|---|")
    folder = WORK / "coco"
    content = json.loads((SOURCE / "annotations" / "instances_train2017.json").read_text())
    images, annotations = [], []
    folder.mkdir(parents=True, exist_ok=True)
    for copy in range(8):
        for image in content["images"]:
            name = f"{copy}-{image['file_name']}"
            shutil.copyfile(SOURCE / "train2017" / image["file_name"], folder / name)
            images.append({**image, "id": image["id"] + copy * 10**7, "file_name": name})
        annotations += [
            {**item, "id": len(annotations) + number, "image_id": item["image_id"] + copy * 10**7}
            for number, item in enumerate(content["annotations"])
        ]
    megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    _write(WORK / "coco.json", images, annotations, content["categories"])
    seconds, _ = _ingest("coco", 32 * 1024 * 1024)
    print(
        f"| {len(images):,} | {megabytes:.0f} | {seconds:.1f} | {len(images) / seconds:.0f} | {megabytes / seconds:.0f} |"
    )
    print("\n| records | JSON, MB | driver's peak, MiB | seconds |\n|---|---|---|---|")
    for count in (5_000, 20_000, 80_000):
        folder = WORK / f"tiny-{count}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 16), (90, 120, 30)).save(folder / "0.jpg")
        for number in range(1, count):
            if not (folder / f"{number}.jpg").exists():
                shutil.copyfile(folder / "0.jpg", folder / f"{number}.jpg")
        images = [{"id": n, "file_name": f"{n}.jpg", "height": 16, "width": 24} for n in range(count)]
        annotations = [
            {
                "id": 7 * n + k,
                "image_id": n,
                "category_id": 1,
                "bbox": [k, 1, 8.5, 9],
                "area": 76.5,
                "iscrowd": 0,
            }
            for n in range(count)
            for k in range(7)
        ]
        _write(WORK / f"tiny-{count}.json", images, annotations, [{"id": 1, "name": "thing"}])
        seconds, peak = _ingest(f"tiny-{count}", 1024 * 1024)
        size = (WORK / f"tiny-{count}.json").stat().st_size / 1e6
        print(f"| {count:,} | {size:.0f} | {peak:.0f} | {seconds:.0f} |", flush=True)


def _write(file: Path, images: list[object], annotations: list[object], categories: list[object]) -> None:
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def _ingest(name: str, shard_bytes: int) -> tuple[float, float]:
    """Return the seconds of an ingest without the start of Ray, and the driver's peak memory in MiB."""
    out = WORK / f"{name}-shards"
    shutil.rmtree(out, ignore_errors=True)
    code = (
        "from raydetr import cluster; cluster.connect(2); import time; t = time.monotonic()\n"
        "from raydetr.data.ingest.ingest import Options, ingest; from raydetr.data.ingest.inputs import InputPaths\n"
        f"ingest(InputPaths({str(WORK / name) + '.json'!r}, {str(WORK / name)!r}), {str(out)!r}, "
        f"Options(shard_bytes={shard_bytes}))\n"
        "print('SECONDS', time.monotonic() - t); print(open('/proc/self/status').read())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=os.getcwd()
    )
    seconds = re.search(r"SECONDS ([\d.]+)", done.stdout)
    peak = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)
    assert seconds is not None
    assert peak is not None
    return float(seconds[1]), int(peak[1]) / 1024


if __name__ == "__main__":
    main()
