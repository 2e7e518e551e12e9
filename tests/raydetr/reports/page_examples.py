"""Example data of the evaluation reports: predictions derived from the ground truth with errors, and an analysis."""

from typing import Any

import numpy as np
import pyarrow as pa

from detr.image_processing.panoptic_png import read_panoptic_png, write_panoptic_png
from detr.metrics.coco import METRIC_NAMES, coco_detection_metrics
from detr.metrics.masks import encode_masks
from raydetr.data.shards import Manifest, ground_truth_annotations, read_records
from raydetr.data.stream.mask_targets import decode_mask, has_mask
from raydetr.prediction.predictions import error_row, table
from raydetr.reports.page_matching import Item, match_image
from raydetr.results.analysis import (
    Analysis,
    Calibration,
    CalibrationBin,
    ClassMetrics,
    Confusion,
    Curves,
    ErrorBreakdown,
    SliceMetrics,
)
from raydetr.results.comparison import Change, ChangedImages, ClassChange, Comparison
from raydetr.results.record import EvaluatedModel, EvaluationData, EvaluationRecord
from tests.to_coco import to_coco_ground_truth

KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
MIN_SCORE = 0.3


def spoilt_predictions(manifest: Manifest, seed: int, masks: bool = False, harm: float = 1.0) -> pa.Table:
    """Predict the ground truth with missed, shifted, misclassified, duplicate and false detections."""
    rng = np.random.default_rng(seed)
    ids = manifest.category_ids
    rows = []
    for record in read_records(manifest):
        if record["image"] is None:
            rows.append(error_row(record["image_id"], "the record has no image bytes"))
            continue
        height, width = record["height"], record["width"]
        detections: list[tuple[float, int, list[float], Any]] = []
        for item in ground_truth_annotations(record):
            chance = rng.random() / harm
            if item["iscrowd"] or chance < 0.12:
                continue
            box = np.array(item["bbox"])
            shift = rng.normal(0, 0.04 if chance > 0.25 else 0.25, 4) * np.tile(box[2:], 2)
            category = item["category_id"] if chance > 0.35 or chance < 0.27 else int(rng.choice(ids))
            score = float(np.clip(rng.normal(0.85 if chance > 0.35 else 0.6, 0.15), 0.02, 1))
            mask = _mask(item, record) if masks else None
            moved = [*(box[:2] + shift[:2]), *np.maximum(box[2:] + shift[2:], 1)]
            detections.append((score, category, moved, mask))
            if rng.random() < 0.1 * harm:
                detections.append((score * 0.7, category, [*(box[:2] + 2), *box[2:]], mask))
        for _ in range(rng.poisson(0.7 * harm)):
            x, y = rng.uniform(0, 0.7, 2) * (width, height)
            size = rng.uniform(0.05, 0.3, 2) * (width, height)
            box = [x, y, *size]
            mask = _mask({"bbox": box, "segmentation": None}, record) if masks else None
            detections.append((float(rng.beta(1.5, 3)), int(rng.choice(ids)), box, mask))
        detections.sort(key=lambda each: -each[0])
        row: dict[str, Any] = {"image_id": record["image_id"], "height": height, "width": width}
        row["score"] = [each[0] for each in detections]
        row["category_id"] = [each[1] for each in detections]
        row["bbox"] = [[float(value) for value in each[2]] for each in detections]
        if masks:
            row["mask"] = [each[3] for each in detections]
        if masks and record["panoptic_image"] is not None:
            row |= _panoptic(record)
        rows.append(row)
    return table(sorted(rows, key=lambda row: row["image_id"]))


def _mask(item: dict[str, Any], record: dict[str, Any]) -> bytes:
    """Return the object's mask, or its filled box, moved by four pixels."""
    height, width = record["height"], record["width"]
    if has_mask(item["segmentation"]):
        decoded = decode_mask(item["segmentation"], height, width)
    else:
        x, y, w, h = (round(value) for value in item["bbox"])
        decoded = np.zeros((height, width), np.uint8)
        decoded[y : y + h, x : x + w] = 1
    return encode_masks(np.roll(decoded, 4, axis=1)[None])[0]["counts"].encode()


def _panoptic(record: dict[str, Any]) -> dict[str, Any]:
    """Return the ground-truth segments without every fifth one, moved by six pixels."""
    ids = read_panoptic_png(record["panoptic_image"])
    segments = [each for index, each in enumerate(record["segments"]) if index % 5 != 1]
    ids = np.roll(np.where(np.isin(ids, [each["id"] for each in segments]), ids, 0), 6, axis=1)
    infos = [{"id": each["id"], "category_id": each["category_id"], "score": 0.9} for each in segments]
    return {"panoptic": write_panoptic_png(ids), "segments": infos}


def make_analysis(manifest: Manifest, predictions: pa.Table) -> Analysis:
    """Build an analysis. Metrics and errors are computed; the rest is plausible."""
    ground_truth = to_coco_ground_truth(manifest)
    metrics = coco_detection_metrics(ground_truth, _results(predictions))
    recall = np.linspace(0, 1, 101)
    names = {int(each["id"]): str(each["name"]) for each in manifest.categories}
    position = {category_id: index for index, category_id in enumerate(names)}
    confusion = np.zeros((len(names) + 1, len(names) + 1), int)
    counts, per_image = dict.fromkeys(KINDS, 0), {}
    bins = [[0, 0.0, 0] for _ in range(10)]
    rows_by_image = {row["image_id"]: row for row in predictions.to_pylist()}
    objects_of: dict[int, list[int]] = {category_id: [] for category_id in names}
    for record in read_records(manifest):
        objects = [
            Item(each["category_id"], tuple(each["bbox"]), crowd=bool(each["iscrowd"]))
            for each in ground_truth_annotations(record)
        ]
        row = rows_by_image[record["image_id"]]
        items = [
            Item(category, tuple(box), score)
            for category, box, score in zip(row["category_id"], row["bbox"], row["score"], strict=True)
            if score >= MIN_SCORE
        ]
        for each in objects:
            objects_of[each.category_id].append(record["image_id"])
        matching = match_image(objects, items)
        image_counts = dict.fromkeys(KINDS, 0) | {"missed": matching.objects.count("missed")}
        for item, kind, referred in zip(items, matching.detections, matching.referred, strict=True):
            image_counts[kind] = image_counts.get(kind, 0) + 1
            true_class = len(names) if referred is None else position[objects[referred].category_id]
            confusion[true_class, position[item.category_id]] += 1
            score_bin = bins[min(int((item.score or 0) * 10), 9)]
            score_bin[0] += 1
            score_bin[1] += item.score or 0
            score_bin[2] += kind == "right"
        for each, status in zip(objects, matching.objects, strict=True):
            confusion[position[each.category_id], -1] += status == "missed"
        per_image[record["image_id"]] = image_counts
        for kind in KINDS:
            counts[kind] += image_counts[kind]
    total = max(sum(counts.values()), 1)
    ap50 = max(metrics["AP50"], 0)
    rows = []
    for index, (category_id, name) in enumerate(names.items()):
        quality = max(ap50 - 0.3 + 0.6 * ((index * 7) % 10) / 10, 0.02)
        images = objects_of[category_id]
        measured = {
            key: min(quality * factor, 1) for key, factor in zip(METRIC_NAMES, np.linspace(0.8, 1.1, 12))
        }
        class_metrics = measured if images else dict.fromkeys(METRIC_NAMES, -1.0)
        rows.append(
            ClassMetrics(
                category_id,
                name,
                objects=len(images),
                images=len(set(images)),
                metrics={key: class_metrics[key] for key in (*METRIC_NAMES[:6], "AR_100")},
                best_threshold=0.2 + 0.05 * (index % 9) if images else -1.0,
                best_f1=class_metrics["AP50"],
            )
        )

    def curve(height: float) -> tuple[float, ...]:
        return tuple(np.clip(1.05 - (recall / max(height, 0.05)) ** 4 * 0.6, 0, 1).round(4).tolist())

    return Analysis(
        metrics=metrics,
        images=len(predictions),
        undecodable=sum(row["error"] is not None for row in rows_by_image.values()),
        intervals={key: (max(metrics[key], 0) - 0.03, metrics[key] + 0.03) for key in ("AP", "AP50", "AP75")},
        resamples=1000,
        classes=tuple(rows),
        curves=Curves(
            tuple(recall.tolist()),
            {"0.50": curve(ap50), "0.75": curve(metrics["AP75"]), "mean": curve(metrics["AP"])},
            {row.id: curve(row.metrics["AP50"]) if row.objects else (-1.0,) * 101 for row in rows},
        ),
        confusion=Confusion(
            (*names.values(), "background"), tuple(map(tuple, confusion.tolist())), 0.5, MIN_SCORE
        ),
        calibration=Calibration(
            ece=0.084,
            mce=0.21,
            bins=tuple(
                CalibrationBin(i / 10, (i + 1) / 10, s / n if n else 0.0, right / n if n else 0.0, n)
                for i, (n, s, right) in enumerate(bins)
            ),
        ),
        errors=ErrorBreakdown(
            counts, {kind: 0.3 * count / total for kind, count in counts.items()}, metrics["AP50"], MIN_SCORE
        ),
        slices={
            "objects per image": (
                SliceMetrics("1 to 3", 60, 120, 0.6, 0.8),
                SliceMetrics("over 30", 1, 40, 0.3, 0.5),
            ),
            "shorter side": (SliceMetrics("up to 480", 61, 160, -1.0, -1.0),),
        },
        worst={kind: _worst(per_image, kind) for kind in KINDS if kind != "both"},
    )


def _worst(per_image: dict[int, dict[str, int]], kind: str) -> tuple[int, ...]:
    ranked = sorted(per_image, key=lambda image_id: -per_image[image_id][kind])
    return tuple(image_id for image_id in ranked if per_image[image_id][kind])[:12]


def _results(predictions: pa.Table) -> list[dict[str, Any]]:
    return [
        {"image_id": row["image_id"], "category_id": category, "bbox": box, "score": score}
        for row in predictions.to_pylist()
        for category, box, score in zip(row["category_id"], row["bbox"], row["score"], strict=True)
    ]


def make_record(
    manifest: Manifest, analysis: Analysis, version: int | None = 3, task: str = "detection"
) -> EvaluationRecord:
    """Build a record of an evaluation."""
    address = f"models:/raydetr/{version}" if version else "/models/last"
    return EvaluationRecord(
        schema_version=2,
        model=EvaluatedModel("raydetr" if version else None, version, address, "ab" * 32),
        data=EvaluationData(manifest.root, manifest.digest),
        settings={"task": task, "max_detections": 100},
        metrics=analysis.metrics,
        images=analysis.images,
        undecodable={1021: "cut short <b>"} if analysis.undecodable else {},
        predictions="runs/evaluations/predictions.parquet",
        report="runs/evaluations/report.html",
        analysis="runs/evaluations/analysis.json",
        run_id="0123456789abcdef",
        date="2026-11-25",
    )


def make_comparison(old: Analysis, new: Analysis) -> Comparison:
    """Compare two analyses, with plausible intervals."""

    def change(before: float, after: float, width: float, better: float | None = None) -> Change:
        delta = after - before
        return Change(before, after, delta, delta - width, delta + width, better)

    classes = [
        ClassChange(
            before.id,
            before.name,
            before.objects,
            change(
                before.metrics["AP"],
                after.metrics["AP"] - 0.2 * (index % 3),
                0.3 / max(before.objects, 1) ** 0.5,
            ),
        )
        for index, (before, after) in enumerate(zip(old.classes, new.classes, strict=True))
    ]
    return Comparison(
        metrics={name: change(old.metrics[name], new.metrics[name], 0.02, 0.98) for name in old.metrics},
        classes={"AP": tuple(classes)},
        images=old.images,
        resamples=1000,
        confidence=0.95,
        changed=ChangedImages(old.worst["missed"][:4], new.worst["localisation"][:4]),
    )
