"""Settings of the training augmentation, separate from `augment`, which imports torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AugmentSpec:
    """Sizes, flips and crops of training images; lengths are in pixels.

    The defaults are those of DETR on COCO. For small images use proportional lengths, such as
    `AugmentSpec(shortest_edges=(96, 112, 128), longest_edge=213, crop_shortest_edges=(64, 80, 96),
    crop_sizes=(60, 96))`.

    Raises:
        ValueError: a probability or a length is out of range.
    """

    flip: float = 0.5
    """Probability of a horizontal flip."""
    shortest_edges: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    """Lengths of the shorter side after the last resize, sampled uniformly."""
    longest_edge: int = 1333
    """Maximum length of the longer side; the shorter side becomes smaller if it is exceeded."""
    crop: bool = True
    """Crop half of the images to a random rectangle."""
    crop_shortest_edges: tuple[int, ...] = (400, 500, 600)
    """Lengths of the shorter side before the crop, sampled uniformly."""
    crop_sizes: tuple[int, int] = (384, 600)
    """Minimum and maximum side of the crop, sampled independently; at most the side of the image."""

    def __post_init__(self) -> None:
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip is {self.flip}: expected a probability from 0 to 1")
        for name in ("shortest_edges", "crop_shortest_edges"):
            lengths = getattr(self, name)
            if not lengths or min(lengths) < 1:
                raise ValueError(f"{name} is {lengths}: expected one or more lengths of at least 1 pixel")
        if self.longest_edge < 1:
            raise ValueError(f"longest_edge is {self.longest_edge}: expected at least 1 pixel")
        if len(self.crop_sizes) != 2 or not 1 <= self.crop_sizes[0] <= self.crop_sizes[1]:
            raise ValueError(
                f"crop_sizes is {self.crop_sizes}: expected (minimum, maximum) with 1 <= minimum <= maximum"
            )

    @classmethod
    def none(cls, shortest_edge: int = 800, longest_edge: int = 1333) -> "AugmentSpec":
        """Return a spec without augmentation: the image processor's resize alone, pixel for pixel."""
        return cls(flip=0.0, shortest_edges=(shortest_edge,), longest_edge=longest_edge, crop=False)
