"""One evaluation from addresses to figures; what pipelines/evaluate.py runs."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from detr.config import DetrConfig
from detr.image_processing.processor import DetrImageProcessor
from detr.inference.detector import padding_share
from raydetr import storage
from raydetr.cluster import connect, require_shared
from raydetr.config import EvaluateConfig
from raydetr.data.ingest.console import print_faults, print_progress
from raydetr.data.ingest.ingest import Options, ingest
from raydetr.data.ingest.inputs import Addresses
from raydetr.data.shards import Manifest, read_records
from raydetr.data.stream.mask_targets import MaskKind, has_mask
from raydetr.data.synthetic.dataset import embedded
from raydetr.errors import BelowBoundError, ConfigError, DataError
from raydetr.evaluation.figures import figure_names
from raydetr.evaluation.record import ANALYSIS, check_room, evaluation_key, find, keep, make, tag_bound
from raydetr.evaluation.score import score
from raydetr.lease import WAIT_S, Held, lease
from raydetr.prediction.actors import ActorOptions
from raydetr.prediction.coco_files import write_coco_files
from raydetr.prediction.predict import predict, read_predictions
from raydetr.prediction.predictions import Masks, PredictionSettings
from raydetr.registry.models import ResolvedModel, resolve
from raydetr.registry.tracking import resolve_uri
from raydetr.reports.page import write_page

_SEARCHED = 64
"""Records that are looked at for masks."""


@dataclass(frozen=True)
class Settings:
    """What, besides model and data, the figures depend on. No threshold for boxes: all queries' detections count."""

    task: str
    precision: str = "float32"
    engine: str = "torch"
    segment_threshold: float = 0.5
    max_detections: int = 100

    @property
    def kind(self) -> MaskKind:
        """Of the truth."""
        return "none" if self.task == "detection" else self.task  # type: ignore[return-value]

    @property
    def masks(self) -> Masks:
        """What is predicted."""
        return self.task if self.task in ("instance", "panoptic") else "none"  # type: ignore[return-value]


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score a model on shards, or find the record of the same evaluation.

    Returns:
        summary: model, data, data_digest, task, images, undecodable, the figures by name and again together as
        `figures`, run_id, predictions, report, output, and whether it was `already_scored`.

    Raises:
        BelowBoundError: `metric` is below `min_metric`; with the summary.
    """
    uri = resolve_uri(config.tracking_uri)
    model = resolve(config.model, uri)
    manifest = _data(config)
    settings = _settings(config, model, manifest)
    output = storage.absolute(config.output or _default_output(model, manifest, settings))
    record = find(model, manifest, asdict(settings), output)
    known = record is not None
    if record is None:
        check_room(model, manifest, asdict(settings), _figure_names(settings.task), output)
        connect(config.actors + 1, gpus=config.actors * config.num_gpus)
        require_shared(data=manifest.root, output=output, tracking_uri=uri)
    if record is None or config.coco_json:
        with lease(output, wait_s=WAIT_S) as held:
            record = find(model, manifest, asdict(settings), output)
            known = record is not None
            if record is None:
                print(
                    f"scoring {model.address} on {manifest.num_images:,} images of {manifest.root}",
                    flush=True,
                )
                record = _evaluate(config, uri, model, manifest, settings, output, held)
            if config.coco_json:
                write_coco_files(read_predictions(record["predictions"]), manifest, output)
    if known:
        print(f"{model.address} is already scored on these data: these are the stored figures.", flush=True)
    summary = {
        "model": model.address,
        "data": manifest.root,
        "data_digest": manifest.digest,
        "task": settings.task,
        "images": record["images"],
        "undecodable": record["num_undecodable"],
        "padding_share": record.get("padding_share", 0.0),
        **record["figures"],
        "figures": record["figures"],
        "run_id": record["run_id"],
        "predictions": record["predictions"],
        "report": record["report"],
        "output": output,
        "already_scored": known,
    }
    if config.min_metric:
        _check_bound(config, uri, model, record, summary)
    return summary


def _evaluate(
    config: EvaluateConfig,
    uri: str,
    model: ResolvedModel,
    manifest: Manifest,
    settings: Settings,
    output: str,
    held: Held,
) -> dict[str, Any]:
    options = ActorOptions(config.actors, config.batch_size, config.num_gpus)
    of = PredictionSettings(settings.masks, config.precision, config.engine, settings.segment_threshold)
    predictions = predict(model, manifest, options, output, of)
    print("computing metrics, intervals and the report", flush=True)
    scored = score(predictions, manifest, settings.kind)
    record = make(model, manifest, asdict(settings), scored.figures, scored.undecodable, predictions, output)
    table = read_predictions(predictions)
    record["padding_share"] = _padding_share(model, table)
    storage.write_json(storage.join(output, ANALYSIS), scored.analysis)
    write_page(record["report"], record, scored.analysis, manifest, table)
    held.verify()
    return keep(uri, model, record, scored.analysis, output)


def _padding_share(model: ResolvedModel, predictions: pa.Table) -> float:
    """What of the pixels that the model saw was padding; 0 where it saw none."""
    processor = DetrImageProcessor.from_pretrained(model.folder)
    sizes = zip(*(predictions[name].to_pylist() for name in ("height", "width")), strict=True)
    resized = [processor.output_size(*size) for size in sizes if None not in size]
    return padding_share(resized) if resized else 0.0


def _data(config: EvaluateConfig) -> Manifest:
    """The shards to score on, made where they are a COCO folder."""
    cpus = config.actors + 1
    if config.data:
        return Manifest.load(storage.absolute(config.data))
    connect(cpus)  # before `embedded`, which asks for less
    if not config.images:
        return Manifest.load(embedded("val"))
    panoptic = config.panoptic_annotations, config.panoptic_masks
    addresses = Addresses(config.annotations, config.images, *panoptic)
    name = "-".join([*addresses.images.split("/")[-2:], _digest(addresses)[:8]])
    options = Options(max_fault_share=config.max_fault_share)
    output = storage.absolute(f"runs/data/{name}")
    manifest = ingest(addresses, output, options, print_progress("ingest")).manifest
    print_faults(manifest)
    return manifest


def _digest(addresses: Addresses) -> str:
    """Names a COCO data set by its addresses and annotations, as hexadecimal digits: edited ones are another."""
    given = {name: value for name, value in asdict(addresses).items() if isinstance(value, str)}
    digest = hashlib.sha256(json.dumps(given).encode())
    for file in filter(None, (addresses.annotations, addresses.panoptic_annotations)):
        digest.update(storage.read_bytes(file))
    return digest.hexdigest()


def _settings(config: EvaluateConfig, model: ResolvedModel, manifest: Manifest) -> Settings:
    """The settings, with what `auto` means for this model and these data.

    Raises:
        ConfigError: the model has no masks, or it and the data have no figure of this name.
        DataError: the data set has no masks.
    """
    has_head = "DetrForSegmentation" in (DetrConfig.from_pretrained(model.folder).architectures or ())
    has_masks, has_segments = _masks_of(manifest)
    task = config.task
    if task == "auto":
        task = "detection"
        if has_head and has_segments:
            task = "panoptic"
        elif has_head and has_masks:
            task = "instance"
    if task in ("instance", "panoptic") and not has_head:
        raise ConfigError(f"--task {task}: {model.address} is a detector without masks.")
    if (task == "instance" and not has_masks) or (task.startswith("panoptic") and not has_segments):
        raise DataError(f"--task {task}: the first {_SEARCHED} records of {manifest.root} have none.")
    known = _figure_names(task)
    if config.metric not in known:
        raise ConfigError(f"--metric {config.metric}: the figures of --task {task} are {', '.join(known)}.")
    return Settings(task, config.precision, config.engine, config.segment_threshold)


def _figure_names(task: str) -> list[str]:
    return list(figure_names(masks=task == "instance", panoptic=task == "panoptic"))


def _masks_of(manifest: Manifest) -> tuple[bool, bool]:
    """Whether objects have masks, and whether there are panoptic segments."""
    columns = ["objects.list.element.segmentation", "segments"]
    masks = segments = False
    for number, record in enumerate(read_records(manifest, columns)):
        if number == _SEARCHED or (masks and segments):
            break
        segments = segments or bool(record["segments"])
        masks = masks or any(has_mask(each["segmentation"]) for each in record["objects"] or ())
    return masks, segments


def _default_output(model: ResolvedModel, manifest: Manifest, settings: Settings) -> str:
    folder = f"runs/evaluations/{model.label}-{manifest.digest[:12]}"
    if settings == Settings("detection"):
        return folder
    return f"{folder}-{settings.task}-{evaluation_key(model, manifest, asdict(settings))[:8]}"


def _check_bound(
    config: EvaluateConfig, uri: str, model: ResolvedModel, record: dict[str, Any], summary: dict[str, Any]
) -> None:
    figures = record["figures"]
    below = figures[config.metric] < config.min_metric
    found = f"{config.metric} {figures[config.metric]:.4f} is below {config.min_metric:g}"
    tag_bound(uri, model, record, found if below else "")
    if below:
        error = BelowBoundError(
            f"{model.address} on {summary['data']} ({summary['data_digest'][:12]}): {found}. Look at {record['report']}."
        )
        error.summary = summary
        raise error
