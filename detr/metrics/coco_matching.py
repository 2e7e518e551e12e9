"""Match the detections of a data set with its ground truth by COCO's rules, from columns of numbers.

The matching is done by hotcoco, a port of pycocotools in Rust. Only this module handles its peculiarities (version
1.3):

- It reads image ids as float64, in which large ids are not distinct. So image ids are replaced by positions.
- It treats a match with annotation id 0 as no match. So annotation ids start at 1.
- For results given as an array it uses the area of the box as that of the mask. So the box is made from the area.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import hotcoco
import numpy as np
from hotcoco import mask as coco_mask

from detr.mask_codec import check_segmentation

Columns = dict[str, np.ndarray]

NUM_IOUS = 10
"""IoU thresholds of COCO: 0.5, 0.55, … 0.95."""
TRUE, FALSE, IGNORED = 1, 0, -1


@dataclass(frozen=True)
class Evaluation:
    """Detections matched with the ground truth, with accumulated precision and recall.

    coco: `hotcoco.COCOeval`, accumulated; its images are positions in `image_ids`.
    image_ids: int64 [images], ascending.
    category_ids: int64 [categories], ascending, in the order of the category axis of `coco.eval["precision"]`.
    objects: rows of the ground truth: `image_id`, `category_id`, `bbox` (x, y, width, height), `area`, `iscrowd`.
    found: rows of the detections of known categories: `image_id`, `category_id`, `bbox` and `score`; for masks `rle`.
    """

    coco: Any
    image_ids: np.ndarray
    category_ids: np.ndarray
    objects: Columns
    found: Columns


@dataclass(frozen=True)
class Matches:
    """Which detections are true at each IoU threshold, over objects of all sizes.

    Detections are in the order in which precision is accumulated: by category, descending score, image.

    image, category: int64 [n], positions in `Evaluation.image_ids` and `category_ids`.
    score: float64 [n].
    row: int64 [n], rows of `Evaluation.found`.
    status: int8 [10, n]: `TRUE`, `FALSE`, or `IGNORED` (matched with a crowd, or beyond the first 100 detections of a
        category in an image).
    object_image, object_category: int64 [objects], of the ground truth without crowds.
    object_row: int64 [objects], rows of `Evaluation.objects`.
    found_by: int64 [10, objects], row in `Evaluation.found` of the detection that matches the object; -1 for none.
    num_images, num_categories: of the ground truth.
    """

    image: np.ndarray
    category: np.ndarray
    score: np.ndarray
    row: np.ndarray
    status: np.ndarray
    object_image: np.ndarray
    object_category: np.ndarray
    object_row: np.ndarray
    found_by: np.ndarray
    num_images: int
    num_categories: int


def evaluate_detections(
    ground_truth: Mapping[str, Any], detections: Columns, iou_type: str = "bbox"
) -> Evaluation:
    """Match detections with a COCO dict, and accumulate precision and recall.

    Args:
        ground_truth: `images`, `categories`, and `annotations` with `image_id`, `category_id`, `bbox` (x, y, width,
            height), `area`, `iscrowd` if it is not 0, and for "segm" `segmentation`.
        detections: a row for each detection: `image_id` and `category_id` int64 [n], `score` float64 [n]; for "bbox"
            `bbox` float64 [n, 4] (x, y, width, height); for "segm" `rle` object [n], RLE dicts of COCO.
        iou_type: "bbox" or "segm".

    Raises:
        ValueError: the ground truth lacks a field, or does not contain the image of a detection.
    """
    image_ids = np.unique(np.array([image["id"] for image in ground_truth["images"]], np.int64))
    category_ids = np.unique(np.array([category["id"] for category in ground_truth["categories"]], np.int64))
    unknown = np.setdiff1d(detections["image_id"], image_ids)
    if len(unknown):
        raise ValueError(
            f"there are detections in {len(unknown)} images that the ground truth does not have, such as image_id "
            f"{unknown[0]}"
        )
    annotations = ground_truth.get("annotations", ())
    objects = columns_of_records(annotations, "annotation", {"area": np.float64, "iscrowd": np.int64})
    if iou_type == "segm":
        objects["segmentation"] = _segmentations(annotations, ground_truth["images"])
    objects = _select(objects, "image_id", image_ids)
    objects = _select(objects, "category_id", category_ids)
    detections = _select(detections, "category_id", category_ids)

    coco_gt = hotcoco.COCO.from_arrays(
        _images(ground_truth["images"], image_ids, with_sizes=iou_type == "segm"),
        [{"id": int(category_id), "name": str(category_id)} for category_id in category_ids],
        np.searchsorted(image_ids, objects["image_id"]),
        objects["category_id"],
        objects["bbox"],
        ids=np.arange(1, len(objects["image_id"]) + 1),
        area=objects["area"],
        iscrowd=objects["iscrowd"],
        segmentation=objects["segmentation"].tolist() if iou_type == "segm" else None,
    )
    positions = np.searchsorted(image_ids, detections["image_id"])
    results = np.empty((len(positions), 7))
    results[:, 0], results[:, 5], results[:, 6] = positions, detections["score"], detections["category_id"]
    if iou_type == "segm":
        rles = detections["rle"].tolist()
        # A box of size area x 1, since hotcoco uses nothing but the area of the box.
        results[:, 1:3], results[:, 3], results[:, 4] = 0, coco_mask.area(rles), 1
        coco_dt = coco_gt.load_res(results, segmentation=rles)
    else:
        results[:, 1:5] = detections["bbox"]
        coco_dt = coco_gt.load_res(results)
    coco = hotcoco.COCOeval(coco_gt, coco_dt, iou_type)
    coco.evaluate()
    coco.accumulate()
    return Evaluation(coco, image_ids, category_ids, objects, detections)


def extract_matches(evaluation: Evaluation) -> Matches:
    """Extract which detections are true at COCO's ten IoU thresholds."""
    detections, objects = evaluation.found, evaluation.objects
    image = np.searchsorted(evaluation.image_ids, detections["image_id"])
    category = np.searchsorted(evaluation.category_ids, detections["category_id"])
    order = np.lexsort((np.arange(len(image)), image, -detections["score"], category))
    object_rows = np.flatnonzero(objects["iscrowd"] == 0)
    status = np.full(
        (NUM_IOUS, len(image) + 1), IGNORED, np.int8
    )  # indexed by hotcoco's ids, which start at 1
    found_by = np.full((NUM_IOUS, len(objects["iscrowd"]) + 1), -1)
    for index, threshold in enumerate(evaluation.coco.params.iou_thrs):
        # No detection has a score of 2, so hotcoco skips its search for label errors.
        diagnostics = evaluation.coco.image_diagnostics(iou_thr=threshold, score_thr=2.0)
        status[index, np.fromiter(diagnostics["dt_status"].keys(), np.int64)] = FALSE
        status[index, np.fromiter(diagnostics["dt_match"].keys(), np.int64)] = TRUE
        ids = np.fromiter(diagnostics["gt_match"].keys(), np.int64)
        found_by[index, ids] = np.fromiter(diagnostics["gt_match"].values(), np.int64) - 1
    return Matches(
        image=image[order],
        category=category[order],
        score=detections["score"][order],
        row=order,
        status=status[:, 1:][:, order],
        object_image=np.searchsorted(evaluation.image_ids, objects["image_id"][object_rows]),
        object_category=np.searchsorted(evaluation.category_ids, objects["category_id"][object_rows]),
        object_row=object_rows,
        found_by=found_by[:, 1:][:, object_rows],
        num_images=len(evaluation.image_ids),
        num_categories=len(evaluation.category_ids),
    )


def columns_of_records(
    records: Sequence[Mapping[str, Any]], kind: str, fields: Mapping[str, type]
) -> Columns:
    """Convert COCO records to arrays.

    Args:
        records: dicts with `image_id`, `category_id`, `bbox` and the additional fields.
        kind: name of the records, for error messages: "detection".
        fields: name to dtype of additional fields; a missing `iscrowd` is 0.

    Returns:
        `image_id` and `category_id` int64 [n], `bbox` float64 [n, 4], and each additional field [n].

    Raises:
        ValueError: a record lacks a field or has a value that is not finite; the message names the first such record.
    """
    fields = {"category_id": np.int64, **fields}
    try:
        columns: Columns = {"image_id": np.array([record["image_id"] for record in records], np.int64)}
        columns["bbox"] = np.array([record["bbox"] for record in records], np.float64).reshape(
            len(records), 4
        )
        for name, dtype in fields.items():
            values = [record.get(name, 0) if name == "iscrowd" else record[name] for record in records]
            columns[name] = np.array(values, dtype)
    except (KeyError, TypeError, ValueError) as error:
        for index, record in enumerate(records if len(records) > 1 else []):
            columns_of_records([record], f"{kind} {index}", fields)
        raise ValueError(
            f"{kind} needs image_id, bbox (x, y, width, height), {', '.join(fields)}; found {str(records[0])[:300]}"
        ) from error
    finite = np.isfinite(columns["bbox"]).all(axis=1)
    for name in fields:
        finite &= np.isfinite(columns[name])
    if not finite.all():
        index = int(np.argmin(finite))
        raise ValueError(f"{kind} {index} is not finite: {str(records[index])[:300]}")
    return columns


def _images(
    images: Sequence[Mapping[str, Any]], image_ids: np.ndarray, with_sizes: bool
) -> list[dict[str, int]]:
    """Convert images to positions in `image_ids`, with the sizes for rasterizing polygons."""
    if not with_sizes:
        return [{"id": position} for position in range(len(image_ids))]
    sizes = {image["id"]: image for image in images}
    for image_id, image in sizes.items():
        if not {"height", "width"} <= image.keys():
            raise ValueError(
                f"image {image_id} of the ground truth has no height and width, which iou_types 'segm' needs"
            )
    # An image that cannot be decoded may have no size. It has no detections, so its objects are missed whatever their
    # masks are.
    return [
        {
            "id": position,
            "height": int(sizes[image_id]["height"] or 1),
            "width": int(sizes[image_id]["width"] or 1),
        }
        for position, image_id in enumerate(image_ids.tolist())
    ]


def _segmentations(
    annotations: Sequence[Mapping[str, Any]], images: Sequence[Mapping[str, Any]]
) -> np.ndarray:
    """Return the checked polygons or RLE of each annotation, object [n]."""
    segmentations = np.empty(len(annotations), object)
    sizes = {
        image["id"]: (int(image["height"]), int(image["width"]))
        for image in images
        if image.get("height") and image.get("width")
    }
    for index, annotation in enumerate(annotations):
        if not annotation.get("segmentation"):
            raise ValueError(
                f"annotation {index} has no segmentation, which iou_types 'segm' needs: {str(annotation)[:300]}"
            )
        segmentations[index] = check_segmentation(
            annotation["segmentation"],
            sizes.get(annotation["image_id"]),
            f"annotation {index} (image_id {annotation['image_id']})",
        )
    return segmentations


def _select(columns: Columns, name: str, wanted: np.ndarray) -> Columns:
    """Select the rows whose `name` is one of the wanted values."""
    rows = np.isin(columns[name], wanted)
    return columns if rows.all() else {key: column[rows] for key, column in columns.items()}
