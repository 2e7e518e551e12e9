"""Figures of a model on a data set in the process that calls: what training uses to follow itself.

`evaluate` scores a registered model with actors and keeps every prediction; here some processes score a share of the
images each, by the same preparation and the same metrics, and nothing is kept.
"""

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from detr.detector import ObjectDetector, PreparedImage
from detr.image_processing.decode import ImageError
from detr.metrics.coco import CocoEvaluator
from detr.metrics.masks import encode_masks
from detr.metrics.panoptic import PanopticEvaluator
from detr.postprocess import post_process_panoptic_segmentation
from detr.postprocess.view import image_views
from raydetr.data.mask_targets import MASK_COLUMNS, MaskKind, mask_targets
from raydetr.data.shards import TRUTH_COLUMNS, Manifest, read_records, truth_annotations
from raydetr.evaluation.categories import UNKNOWN, match_categories

BATCH_SIZE = 8


@dataclass
class Share:
    """Truth and predictions of some images; shares of several processes are joined by `join`.

    images, annotations: COCO entries of the truth.
    found: image id → what `CocoEvaluator.update` takes.
    segments: panoptic: image id → the truth's PNG and segments, the predicted map and its segments.
    """

    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    found: dict[int, dict[str, Any]] = field(default_factory=dict)
    segments: dict[int, dict[str, Any]] = field(default_factory=dict)

    def results(self) -> Iterator[dict[str, Any]]:
        """The boxes found, in COCO's results form."""
        for image_id, found in self.found.items():
            for score, category_id, (left, top, right, bottom) in zip(
                found["scores"].tolist(), found["labels"].tolist(), found["boxes"].tolist(), strict=True
            ):
                box = [left, top, right - left, bottom - top]
                yield {"image_id": image_id, "category_id": category_id, "score": score, "bbox": box}


def predict_share(
    detector: ObjectDetector,
    manifest: Manifest,
    kind: MaskKind,
    number: int = 0,
    of: int = 1,
    images: int = 0,
) -> Share:
    """Predict every `of`-th image of a data set, from image `number` on.

    Args:
        detector: the model.
        manifest: of the shards.
        kind: what is scored.
        number: of this process.
        of: how many processes there are.
        images: of the data set that are scored in all, the first ones; 0: all.
    """
    share = Share()
    waiting: dict[tuple[int, int], list[tuple[int, PreparedImage]]] = defaultdict(list)
    columns = [*TRUTH_COLUMNS, "image", "fault", *MASK_COLUMNS[kind]]
    for index, record in enumerate(read_records(manifest, columns)):
        if images and index >= images:
            break
        if index % of != number:
            continue
        _add_truth(share, record, manifest, kind)
        try:
            prepared = detector.prepare(record["image"] or b"")
        except ImageError:
            continue  # its objects count as missed
        like = waiting[prepared.shape]
        like.append((record["image_id"], prepared))
        if len(like) == BATCH_SIZE:
            _predict(share, detector, waiting.pop(prepared.shape), manifest, kind)
    for like in waiting.values():
        _predict(share, detector, like, manifest, kind)
    return share


def join(shares: Sequence[Share]) -> Share:
    """Several shares as one."""
    whole = Share()
    for share in shares:
        whole.images += share.images
        whole.annotations += share.annotations
        whole.found |= share.found
        whole.segments |= share.segments
    return whole


def figures(share: Share, manifest: Manifest, kind: MaskKind) -> dict[str, float]:
    """AP of boxes (`AP`, `AP50`, …), of masks (`mask_AP`, …) for instances, and PQ, SQ, RQ for panoptic segments."""
    truth = {
        "images": share.images,
        "annotations": share.annotations,
        "categories": list(manifest.categories),
    }
    # Ids of annotations are the data set's own for objects; segments' repeat from image to image.
    truth["annotations"] = [{**item, "id": n} for n, item in enumerate(share.annotations, 1)]
    boxes = CocoEvaluator(truth, "bbox")
    boxes.update(share.found)
    boxes.accumulate()
    result = dict(boxes.summarize()["bbox"])
    if kind == "instance":
        with_masks = [item for item in truth["annotations"] if item.get("segmentation")]
        masks = CocoEvaluator({**truth, "annotations": with_masks}, "segm")
        masks.update(share.found)
        masks.accumulate()
        result |= {f"mask_{name}": value for name, value in masks.summarize()["segm"].items()}
    if kind == "panoptic":
        result |= _panoptic_quality(share, manifest)
    return result


def _add_truth(share: Share, record: Mapping[str, Any], manifest: Manifest, kind: MaskKind) -> None:
    share.images.append({"id": record["image_id"], "height": record["height"], "width": record["width"]})
    if kind in ("none", "instance"):
        for item in truth_annotations(record):
            share.annotations.append({**item, "segmentation": _coco_segmentation(item.get("segmentation"))})
        return
    boxes, labels, _ = mask_targets(record, manifest.labels, kind)
    ids = manifest.category_ids
    for (left, top, right, bottom), label in zip(boxes.tolist(), labels.tolist(), strict=True):
        box = [left, top, right - left, bottom - top]
        share.annotations.append(
            {"image_id": record["image_id"], "category_id": ids[label], "bbox": box, "area": box[2] * box[3]}
        )
    if kind == "panoptic" and record["panoptic_image"] is not None:
        names = ("id", "category_id", "area", "bbox", "iscrowd")
        segments = [{name: item[name] for name in names} for item in record["segments"] or ()]
        share.segments[record["image_id"]] = {"png": record["panoptic_image"], "truth": segments}


def _coco_segmentation(segmentation: Mapping[str, Any] | None) -> Any:
    """A record's mask as COCO writes it: polygons or RLE; None where there is none."""
    if not segmentation:
        return None
    if segmentation["polygons"] is not None:
        return segmentation["polygons"] or None
    rle = segmentation["rle"]
    if rle is None:
        return None
    counts = rle["runs"] if rle["counts"] is None else rle["counts"]
    return {"size": list(rle["size"]), "counts": counts.decode() if isinstance(counts, bytes) else counts}


def _predict(
    share: Share,
    detector: ObjectDetector,
    like: Sequence[tuple[int, PreparedImage]],
    manifest: Manifest,
    kind: MaskKind,
) -> None:
    category_ids = np.array(match_categories(detector.model.config.id2label, manifest.categories))
    image_ids, prepared = [image_id for image_id, _ in like], [image for _, image in like]
    outputs = detector.run(prepared)
    sizes, processed, padded = (
        [i.original_size for i in prepared],
        [i.size for i in prepared],
        prepared[0].shape,
    )
    views = image_views(outputs.pred_masks, sizes, processed, padded) if kind == "instance" else []
    for index, found in enumerate(detector.detections(outputs, prepared)):
        known = category_ids[found.labels] != UNKNOWN
        share.found[image_ids[index]] = {
            "scores": found.scores[known],
            "labels": category_ids[found.labels][known],
            "boxes": found.boxes_xyxy[known],
        }
        if kind == "instance":
            # One after the other: at full size all of them would be gigabytes.
            share.found[image_ids[index]]["masks"] = [
                encode_masks(views[index].resize(outputs.pred_masks[index, query][None]) > 0)[0]
                for query in found.queries[known].tolist()
            ]
    if kind == "panoptic":
        stuff = {category["id"] for category in manifest.categories if not category.get("isthing", 1)}
        maps = post_process_panoptic_segmentation(
            outputs,
            0.5,
            label_ids_to_fuse=[label for label, category in enumerate(category_ids) if category in stuff],
            target_sizes=sizes,
            processed_sizes=processed,
            padded_size=padded,
            integer_maps=True,
            merge_fused=True,
        )
        for image_id, found_map in zip(image_ids, maps, strict=True):
            if image_id in share.segments:
                share.segments[image_id] |= _predicted_segments(found_map, category_ids)


def _predicted_segments(found_map: Mapping[str, Any], category_ids: np.ndarray) -> dict[str, Any]:
    """The map and segments of an image, those of classes that the data set does not have being void."""
    ids = found_map["segmentation"].cpu().numpy().astype(np.int64)
    segments = []
    for item in found_map["segments_info"]:
        category_id = int(category_ids[item["label_id"]])
        if category_id == UNKNOWN:
            ids[ids == item["id"]] = 0
        else:
            segments.append({"id": item["id"], "category_id": category_id})
    return {"map": ids, "found": segments}


def _panoptic_quality(share: Share, manifest: Manifest) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        truth = []
        for image_id, item in share.segments.items():
            Path(folder, f"{image_id}.png").write_bytes(item["png"])
            truth.append(
                {"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": item["truth"]}
            )
        evaluator = PanopticEvaluator({"annotations": truth, "categories": list(manifest.categories)}, folder)
        for image_id, item in share.segments.items():
            found = item.get("map", np.zeros(_size_of(item["png"]), np.int64)), item.get("found", [])
            evaluator.update([{"image_id": image_id, "segmentation": found[0], "segments_info": found[1]}])
        summary = evaluator.summarize()
    return {
        f"{name.upper()}{'' if group == 'All' else '_' + group.lower()}": summary[group][name]
        for group in ("All", "Things", "Stuff")
        for name in ("pq", "sq", "rq")
    }


def _size_of(png: bytes) -> tuple[int, int]:
    with Image.open(BytesIO(png)) as image:
        return image.height, image.width
