"""`DetrImageProcessorPil`: the image processor with Pillow's resize, bitwise equal to transformers' class of this name.

The original DETR and its checkpoints use Pillow's resize. The pixels of torch's resize differ from it by one gray level
in places. `DetrImageProcessor` is faster.
"""

import numpy as np
import torch
from PIL import Image

from detr.image_processing.masks import pillow_nearest_indices, resize_map
from detr.image_processing.processor import DetrImageProcessor


class DetrImageProcessorPil(DetrImageProcessor):
    """Prepare images and COCO annotations for DETR with Pillow; the settings are those of `DetrImageProcessor`.

    `resample` is any of Pillow's filters, 0 to 5. Pillow resizes 8-bit pixels, so floating-point arrays are converted
    to 0..255 first, as in transformers: their values must be in 0..1, or whole numbers in 0..255.
    """

    _is_fast = False

    def resize(self, image: torch.Tensor) -> torch.Tensor:
        """Resize an image [channels, height, width] with Pillow: uint8, or float32 for values in 0..1.

        Raises:
            ValueError: values are neither in 0..1 nor whole numbers in 0..255.
        """
        if not self.do_resize:
            return image
        values = image.cpu()
        rescaled = values.dtype != torch.uint8 and not _are_bytes(values)
        if rescaled:
            if not (values >= 0).all() or not (values <= 1).all():
                raise ValueError(
                    f"the image has values from {values.min():g} to {values.max():g}: Pillow resizes 8 bits, so they "
                    "have to be within 0..1, or whole numbers within 0..255"
                )
            values = (values.double() * 255).float()
        resized = _resize(values.to(torch.uint8), self.output_size(*image.shape[-2:]), self.resample)
        if rescaled:
            resized = (resized.double() * (1 / 255)).float()
        return resized.to(image.device)

    def resize_map(self, values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Resize masks or label maps, bool or int [..., height, width], with Pillow's nearest filter."""
        return resize_map(values, size, pillow_nearest_indices)

    def rescale_and_normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Rescale and normalize after the resize.

        The factor is applied in float64, and the result is rounded to float32 before the mean is subtracted.

        Returns:
            float32 [..., channels, height, width]; the unchanged pixels if both steps are off.

        Raises:
            ValueError: the mean or the standard deviation has the wrong number of values for the channels.
        """
        if self.do_rescale:
            images = (images.double() * self.rescale_factor).float()
        if not self.do_normalize:
            return images
        if not images.is_floating_point():
            images = images.float()
        channels = images.shape[-3]
        mean, std = (
            torch.tensor(values, dtype=images.dtype, device=images.device).reshape(-1, 1, 1)
            for values in (self.image_mean, self.image_std)
        )
        if not {len(mean), len(std)} <= {1, channels}:
            raise ValueError(
                f"an image has {channels} channels, but image_mean has {len(mean)} values and image_std {len(std)}: "
                "give one for each channel"
            )
        return (images - mean) / std


def _are_bytes(values: torch.Tensor) -> bool:
    whole = torch.allclose(values.double(), values.long().double())
    return whole and bool((values >= 0).all()) and bool((values <= 255).all())


def _resize(image: torch.Tensor, size: tuple[int, int], resample: int) -> torch.Tensor:
    """Resize uint8 [channels, height, width] with Pillow; any number of channels."""
    height, width = size
    if image.shape[0] == 3:
        pixels = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
        resized = np.array(pixels.resize((width, height), Image.Resampling(resample)))
        return torch.from_numpy(resized).permute(2, 0, 1)
    bands = [
        np.array(Image.fromarray(band).resize((width, height), Image.Resampling(resample)))
        for band in image.numpy()
    ]
    return torch.from_numpy(np.stack(bands))
