"""The evaluation job of pipelines/evaluate.py: from the URIs of a model and a data set to stored metrics."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace

import pyarrow as pa

from detr.config import DetrConfig
from detr.image_processing.processor import DetrImageProcessor
from detr.inference.detector import padding_share
from raydetr import storage
from raydetr.cluster import connect, require_shared
from raydetr.config import EvaluateConfig
from raydetr.data.ingest.console import print_faults, print_progress
from raydetr.data.ingest.ingest import Options, ingest
from raydetr.data.ingest.inputs import InputPaths
from raydetr.data.shards import Manifest, read_records
from raydetr.data.stream.mask_targets import MaskKind, has_mask
from raydetr.data.synthetic.dataset import embedded
from raydetr.errors import BelowMinimumError, ConfigError, DataError
from raydetr.evaluation.metrics import metric_names
from raydetr.evaluation.record import (
    ANALYSIS,
    build_record,
    check_record_fits,
    evaluation_key,
    find_record,
    keep,
    tag_below_minimum,
)
from raydetr.evaluation.score import score
from raydetr.lease import WAIT_S, Held, lease
from raydetr.prediction.actors import ActorOptions
from raydetr.prediction.coco_files import write_coco_files
from raydetr.prediction.predict import predict, read_predictions
from raydetr.prediction.predictions import Masks, PredictionSettings
from raydetr.registry.models import ResolvedModel, resolve
from raydetr.registry.tracking import resolve_uri
from raydetr.reports.page import write_page
from raydetr.results.json_form import to_json
from raydetr.results.record import EvaluationRecord
from raydetr.results.summary import EvaluationSummary

_SEARCHED = 64
"""Number of records in which `_masks_of` looks for masks."""


@dataclass(frozen=True)
class Settings:
    """Everything that the metrics depend on in addition to the model and the data.

    Boxes have no score threshold: the detections of all queries count.
    """

    task: str
    precision: str = "float32"
    engine: str = "torch"
    segment_threshold: float = 0.5
    max_detections: int = 100

    @property
    def kind(self) -> MaskKind:
        """Masks of the ground truth."""
        return "none" if self.task == "detection" else self.task  # type: ignore[return-value]

    @property
    def masks(self) -> Masks:
        """Masks to predict."""
        return self.task if self.task in ("instance", "panoptic") else "none"  # type: ignore[return-value]


def evaluate(config: EvaluateConfig) -> EvaluationSummary:
    """Score a model on shards, or return the stored record of the same evaluation.

    Raises:
        BelowMinimumError: `metric` is below `min_metric`. The error carries the summary.
    """
    uri = resolve_uri(config.tracking_uri)
    model = resolve(config.model, uri)
    manifest = _load_data(config)
    settings = _settings(config, model, manifest)
    output = storage.absolute(config.output or _default_output(model, manifest, settings))
    record = find_record(model, manifest, asdict(settings), output)
    known = record is not None
    if record is None:
        check_record_fits(model, manifest, asdict(settings), _metric_names(settings.task), output)
        connect(config.actors + 1, gpus=config.actors * config.num_gpus)
        require_shared(data=manifest.root, output=output, tracking_uri=uri)
    if record is None or config.coco_json:
        with lease(output, wait_s=WAIT_S) as held:
            record = find_record(model, manifest, asdict(settings), output)
            known = record is not None
            if record is None:
                print(
                    f"scoring {model.model_uri} on {manifest.num_images:,} images of {manifest.root}",
                    flush=True,
                )
                record = _evaluate(config, uri, model, manifest, settings, output, held)
            if config.coco_json:
                write_coco_files(read_predictions(record.predictions), manifest, output)
    if known:
        print(f"{model.model_uri} is already scored on this data. Using the stored metrics.", flush=True)
    summary = EvaluationSummary(
        model=model.model_uri,
        data=manifest.root,
        data_digest=manifest.digest,
        task=settings.task,
        images=record.images,
        undecodable=record.num_undecodable or 0,
        padding_share=record.padding_share or 0.0,
        metrics=record.metrics,
        run_id=str(record.run_id),
        predictions=record.predictions,
        report=record.report,
        output=output,
        already_scored=known,
    )
    if config.min_metric:
        _check_minimum(config, uri, model, record, summary)
    return summary


def _evaluate(
    config: EvaluateConfig,
    uri: str,
    model: ResolvedModel,
    manifest: Manifest,
    settings: Settings,
    output: str,
    held: Held,
) -> EvaluationRecord:
    options = ActorOptions(config.actors, config.batch_size, config.num_gpus)
    to_predict = PredictionSettings(
        settings.masks, config.precision, config.engine, settings.segment_threshold
    )
    predictions = predict(model, manifest, options, output, to_predict)
    print("computing metrics, intervals and the report", flush=True)
    scored = score(predictions, manifest, settings.kind)
    record = build_record(
        model, manifest, asdict(settings), scored.metrics, scored.undecodable, predictions, output
    )
    table = read_predictions(predictions)
    record = replace(record, padding_share=_padding_share(model, table))
    storage.write_json(storage.join(output, ANALYSIS), to_json(scored.analysis))
    write_page(record.report, record, scored.analysis, manifest, table)
    held.verify()
    return keep(uri, model, record, scored.analysis, output)


def _padding_share(model: ResolvedModel, predictions: pa.Table) -> float:
    """Return the share of padding in the pixels of the model's input; 0 if no image could be decoded."""
    processor = DetrImageProcessor.from_pretrained(model.folder)
    sizes = zip(*(predictions[name].to_pylist() for name in ("height", "width")), strict=True)
    resized = [processor.output_size(*size) for size in sizes if None not in size]
    return padding_share(resized) if resized else 0.0


def _load_data(config: EvaluateConfig) -> Manifest:
    """Load the manifest to score on. A COCO folder is ingested first."""
    cpus = config.actors + 1
    if config.data:
        return Manifest.load(storage.absolute(config.data))
    connect(cpus)  # before `embedded`, which requests fewer CPUs
    if not config.images:
        return Manifest.load(embedded("val"))
    panoptic = config.panoptic_annotations, config.panoptic_masks
    paths = InputPaths(config.annotations, config.images, *panoptic)
    name = "-".join([*paths.images.split("/")[-2:], _digest(paths)[:8]])
    options = Options(max_fault_share=config.max_fault_share)
    output = storage.absolute(f"runs/data/{name}")
    manifest = ingest(paths, output, options, print_progress("ingest")).manifest
    print_faults(manifest)
    return manifest


def _digest(paths: InputPaths) -> str:
    """Return the hex digest of a COCO data set's URIs and annotation files, so that edited files are ingested again."""
    uris = {name: value for name, value in asdict(paths).items() if isinstance(value, str)}
    digest = hashlib.sha256(json.dumps(uris).encode())
    for file in filter(None, (paths.annotations, paths.panoptic_annotations)):
        digest.update(storage.read_bytes(file))
    return digest.hexdigest()


def _settings(config: EvaluateConfig, model: ResolvedModel, manifest: Manifest) -> Settings:
    """Resolve the settings, including `--task auto` for this model and data set.

    Raises:
        ConfigError: the model has no mask head, or the task has no metric of this name.
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
        raise ConfigError(f"--task {task}: {model.model_uri} has no mask head. Use --task detection.")
    if (task == "instance" and not has_masks) or (task.startswith("panoptic") and not has_segments):
        missing = "object masks" if task == "instance" else "panoptic segments"
        raise DataError(f"--task {task}: the first {_SEARCHED} records of {manifest.root} have no {missing}.")
    known = _metric_names(task)
    if config.metric not in known:
        raise ConfigError(f"--metric {config.metric}: the metrics of --task {task} are {', '.join(known)}.")
    return Settings(task, config.precision, config.engine, config.segment_threshold)


def _metric_names(task: str) -> list[str]:
    return list(metric_names(masks=task == "instance", panoptic=task == "panoptic"))


def _masks_of(manifest: Manifest) -> tuple[bool, bool]:
    """Return whether the first records have object masks and whether they have panoptic segments."""
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


def _check_minimum(
    config: EvaluateConfig,
    uri: str,
    model: ResolvedModel,
    record: EvaluationRecord,
    summary: EvaluationSummary,
) -> None:
    value = record.metrics[config.metric]
    is_below = value < config.min_metric
    problem = f"{config.metric} {value:.4f} is below {config.min_metric:g}"
    tag_below_minimum(uri, model, record, problem if is_below else "")
    if is_below:
        error = BelowMinimumError(
            f"{model.model_uri} on {summary.data} ({summary.data_digest[:12]}): {problem}. See {record.report}."
        )
        error.summary = summary.to_output()
        raise error
