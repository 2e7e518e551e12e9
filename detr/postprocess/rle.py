"""Run-length encodings of a map of segments, in the formats of transformers and COCO."""

import numpy as np
from torch import Tensor

from detr.mask_codec import Rle, encode_runs


def transformers_rle(segmentation: Tensor) -> list[list[int]]:
    """Return the runs of each id of a map, in ascending order of ids, including the background 0.

    This is not COCO's encoding: pixels are numbered row by row from 1, and a run is its start and its length.

    Args:
        segmentation: int [height, width].

    Returns:
        For each id [start, length, start, length, ...], Python integers.
    """
    return [
        np.stack([starts + 1, lengths], 1).flatten().tolist()
        for _, (starts, lengths) in sorted(_runs(segmentation.cpu().numpy().flatten()).items())
    ]


def coco_rle(segmentation: Tensor, ids: list[int]) -> list[Rle]:
    """Encode the masks of some ids of a map as COCO's compressed run-length encoding.

    Args:
        segmentation: int [height, width].
        ids: ids of the segments; an id that is not in the map gets an empty mask.

    Returns:
        For each id `{"size": [height, width], "counts": str}`, which `json.dumps` and `pycocotools.mask` accept.
    """
    height, width = segmentation.shape
    runs = _runs(segmentation.cpu().numpy().flatten("F"))
    nothing = np.zeros(0, np.int64)
    encoded = []
    for id in ids:
        starts, lengths = runs.get(id, (nothing, nothing))
        # Alternating run lengths of 0 and 1; the first run is of 0 and may be empty.
        edges = np.stack([starts, starts + lengths], 1).flatten()
        end = [] if len(edges) and edges[-1] == height * width else [height * width]
        encoded.append(encode_runs(np.diff(edges, prepend=0, append=end).tolist(), height, width))
    return encoded


def _runs(values: np.ndarray) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Return the 0-based starts and the lengths of the runs of each value."""
    starts = np.concatenate([[0], np.flatnonzero(values[1:] != values[:-1]) + 1])
    lengths = np.diff(np.append(starts, len(values)))
    value_of_run = values[starts]
    return {
        int(value): (starts[value_of_run == value], lengths[value_of_run == value])
        for value in np.unique(value_of_run)
    }
