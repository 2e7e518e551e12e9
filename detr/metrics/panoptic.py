"""Panoptic quality (PQ), as panopticapi computes it.

An image is matched when it is added. Only four numbers for each of its classes are stored, so memory does not grow with
the number of pixels, and processes exchange little data. The rules are in `detr.metrics.panoptic_matching`.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detr.image_processing.panoptic_png import read_panoptic_png, write_panoptic_png
from detr.metrics.panoptic_matching import VOID, Counts, match_segments, mean_quality, quality
from detr.output_names import output_name

logger = logging.getLogger(__name__)


class PanopticEvaluator:
    """Compare panoptic predictions with COCO ground truth image by image, with the interface of the original DETR.

    Only images that were passed to `update` are evaluated, so a part of a data set can be evaluated.

    Args:
        ann_file: the ground truth: a COCO panoptic JSON file or its content, with `annotations` and `categories`.
        ann_folder: the folder with the PNG files of the ground truth.
        output_dir: the folder in which `update` writes PNG files of predictions, and `summarize` writes
            `predictions.json`, in COCO's panoptic format; None writes nothing.

    Raises:
        FileNotFoundError: the file or folder does not exist.
        ValueError: the ground truth is not in COCO's panoptic format.
    """

    def __init__(
        self,
        ann_file: str | Path | Mapping[str, Any],
        ann_folder: str | Path,
        output_dir: str | Path | None = None,
    ) -> None:
        ground_truth = (
            ann_file
            if isinstance(ann_file, Mapping)
            else json.loads(Path(ann_file).read_text(encoding="utf-8"))
        )
        annotations = ground_truth.get("annotations", [])
        if "categories" not in ground_truth or any("segments_info" not in entry for entry in annotations):
            raise ValueError(
                "the ground truth is not in COCO's panoptic format: expected categories and, in each annotation, "
                "segments_info"
            )
        if not Path(ann_folder).is_dir():
            raise FileNotFoundError(f"there is no folder {ann_folder} with the PNG files of the ground truth")
        self.categories = {int(category["id"]): dict(category) for category in ground_truth["categories"]}
        self._annotations = {int(entry["image_id"]): entry for entry in annotations}
        self._folder = Path(ann_folder)
        self._output = None if output_dir is None else Path(output_dir)
        self._counts: dict[int, Counts] = {}
        self._written: dict[int, dict[str, Any]] = {}
        self._names: dict[str, int] = {}

    def update(self, predictions: Iterable[Mapping[str, Any]]) -> None:
        """Match the predictions of some images with the ground truth; earlier predictions of an image are replaced.

        Args:
            predictions: for each image a dict with `image_id`, `segments_info` and a map in one of two forms:
                `png_string`, bytes of a PNG whose colors encode ids as COCO does (`rgb_to_id`), 0 being void, as
                `post_process_panoptic` returns it; or `segmentation`, int [H, W] of ids, 0 and below being void,
                as `post_process_panoptic_segmentation` returns it, at the size of the ground truth.
                `segments_info` has a dict with `id` and `category_id` (or `label_id`) for each segment; a repeated id
                (fused segments) counts once. `file_name` is the name of the PNG to write, by default that of the ground
                truth. Other entries are ignored.

        Raises:
            ValueError: the image is not in the ground truth, the sizes differ, the ids of the map and of
                `segments_info` differ, a category is not in the ground truth, or two images would be written to the
                same file. The message names the image.
            FileNotFoundError: a PNG file of the ground truth is missing.
        """
        for prediction in predictions:
            image_id = int(prediction["image_id"])
            where = f"image {image_id}"
            if image_id not in self._annotations:
                raise ValueError(f"{where} is not in the ground truth ({len(self._annotations)} images)")
            annotation = self._annotations[image_id]
            true_map = read_panoptic_png((self._folder / annotation["file_name"]).read_bytes())
            predicted_map = _predicted_map(prediction, where)
            if predicted_map.shape != true_map.shape:
                raise ValueError(
                    f"{where}: the prediction is {predicted_map.shape}, the ground truth {true_map.shape}"
                )
            segments = _categories_of_segments(prediction["segments_info"], where)
            unknown = set(segments.values()) - self.categories.keys()
            if unknown:
                raise ValueError(f"{where}: the ground truth has no category {sorted(unknown)[0]}")
            self._counts[image_id] = match_segments(
                true_map, annotation["segments_info"], predicted_map, segments, where
            )
            if self._output is not None:
                self._write(prediction, annotation, predicted_map, segments)

    def synchronize_between_processes(self) -> None:
        """Gather the matches of all `torch.distributed` processes; an image that several processes have counts once."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, (self._counts, self._written))
        self._counts, self._written = {}, {}
        for counts, written in gathered:
            self._counts = counts | self._counts
            self._written = written | self._written

    def summarize(self) -> dict[str, Any]:
        """Compute the metrics over all images, and log them in the format of panopticapi.

        Returns:
            "All", "Things" and "Stuff" to `{"pq", "sq", "rq": float in 0..1, "n": int}`, the mean over the n categories
            with segments in the ground truth or a prediction (0 for n = 0); "per_class" to a dict of category id to
            `{"pq", "sq", "rq"}`, for all categories.
        """
        totals = {category_id: np.zeros(4) for category_id in self.categories}
        for counts in self._counts.values():
            for category_id, values in counts.items():
                totals[category_id] += values
        if self._output is not None:
            self._output.mkdir(parents=True, exist_ok=True)
            content = {"annotations": [self._written[image_id] for image_id in sorted(self._written)]}
            (self._output / "predictions.json").write_text(json.dumps(content), encoding="utf-8")
        things = {name for name, category in self.categories.items() if category.get("isthing") == 1}
        groups = {"All": totals.keys(), "Things": things, "Stuff": totals.keys() - things}
        metrics: dict[str, Any] = {
            name: mean_quality([totals[category_id] for category_id in ids]) for name, ids in groups.items()
        }
        for line in _table(metrics):
            logger.info(line)
        return metrics | {
            "per_class": {category_id: quality(values) for category_id, values in totals.items()}
        }

    def _write(
        self,
        prediction: Mapping[str, Any],
        annotation: Mapping[str, Any],
        predicted_map: np.ndarray,
        segments: dict[int, int],
    ) -> None:
        assert self._output is not None
        image_id = int(prediction["image_id"])
        name = prediction.get("file_name", annotation["file_name"])
        name = output_name(name, "" if name.endswith(".png") else ".png")
        if (other := self._names.setdefault(name, image_id)) != image_id:
            raise ValueError(
                f"images {other} and {image_id}: both maps would be written to {name}: rename one of them"
            )
        file = self._output / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(prediction.get("png_string") or write_panoptic_png(predicted_map))
        info = [{"id": segment, "category_id": category} for segment, category in segments.items()]
        self._written[image_id] = {"image_id": image_id, "file_name": name, "segments_info": info}


def _categories_of_segments(segments_info: Sequence[Mapping[str, Any]], where: str) -> dict[int, int]:
    categories: dict[int, int] = {}
    for segment in segments_info:
        if "id" not in segment or not {"category_id", "label_id"} & segment.keys():
            raise ValueError(
                f"{where}: a segment is {dict(segment)}: expected id and category_id or label_id"
            )
        category_id = int(segment["category_id"] if "category_id" in segment else segment["label_id"])
        if categories.setdefault(int(segment["id"]), category_id) != category_id:
            raise ValueError(f"{where}: segment {segment['id']} has two categories in segments_info")
    return categories


def _predicted_map(prediction: Mapping[str, Any], where: str) -> np.ndarray:
    if "png_string" in prediction:
        return read_panoptic_png(prediction["png_string"])
    if "segmentation" not in prediction:
        raise ValueError(f"{where}: the prediction has neither png_string nor segmentation")
    segmentation = prediction["segmentation"]
    if isinstance(segmentation, torch.Tensor):
        segmentation = segmentation.detach().cpu().numpy()
    return np.maximum(np.asarray(segmentation), VOID).astype(np.int64)


def _table(metrics: Mapping[str, Mapping[str, float]]) -> list[str]:
    lines = ["{:10s}| {:>5s}  {:>5s}  {:>5s} {:>5s}".format("", "PQ", "SQ", "RQ", "N"), "-" * 38]
    for name, values in metrics.items():
        pq, sq, rq = (100 * values[key] for key in ("pq", "sq", "rq"))
        lines.append(f"{name:10s}| {pq:5.1f}  {sq:5.1f}  {rq:5.1f} {values['n']:5d}")
    return lines
