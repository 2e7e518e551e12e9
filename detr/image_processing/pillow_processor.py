"""`DetrImageProcessorPil`: the image processor with Pillow's resize, to the last bit of transformers' class of this name.

Pillow's pixels are those of the original DETR and of checkpoints trained with it; torch's differ from them by one grey
level here and there. `DetrImageProcessor` is the faster one.
"""

import numpy as np
import torch
from PIL import Image

from detr.image_processing.masks import pillow_nearest_indices, resize_map
from detr.image_processing.processor import DetrImageProcessor


class DetrImageProcessorPil(DetrImageProcessor):
    """Prepares images and COCO annotations for a DETR, with Pillow; settings are those of `DetrImageProcessor`.

    `resample` is any of Pillow's filters, 0 to 5. It resizes 8 bits, so that arrays of floating-point values become
    0..255 before, as in transformers: they have to be within 0..1, or whole numbers within 0..255.
    """

    _uses_torch = False

    def resize(self, image: torch.Tensor) -> torch.Tensor:
        """The image [channels, height, width] resized by Pillow: uint8, or float32 for values within 0..1.

        Raises:
            ValueError: values that are neither within 0..1 nor whole numbers within 0..255.
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
        """Masks or label maps, bool or int [..., height, width], at another size, by Pillow's nearest filter."""
        return resize_map(values, size, pillow_nearest_indices)

    def rescale_and_normalize(self, images: torch.Tensor) -> torch.Tensor:
        """What follows the resize; the factor is applied in float64 and rounded before the mean is subtracted.

        Returns:
            float32 [..., channels, height, width]; without both steps the pixels as they are.

        Raises:
            ValueError: the mean or the standard deviation has values for another number of channels.
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
    """uint8 [channels, height, width] resized by Pillow; any number of channels."""
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
