"""Run all checks in order; skip those that depend on a failed one."""

from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import ray

from raydetr import storage
from raydetr.data.shards import Manifest
from raydetr.data.synthetic.dataset import EMBEDDED_ROOT, embedded
from raydetr.doctor import batch, data, estimate, reach, resources, shards, trial, versions
from raydetr.doctor.config import DoctorConfig
from raydetr.doctor.findings import Finding, Report
from raydetr.doctor.nodes import Node, alive
from raydetr.doctor.on_node import NodeDescription
from raydetr.doctor.shards import Contents
from raydetr.errors import ConfigError, StorageError
from raydetr.flat_keys import override
from raydetr.lease import lease
from raydetr.registry import tracking
from raydetr.training.model import build_model
from raydetr.training.preview import resolution_cautions


def examine(config: DoctorConfig) -> dict[str, Any]:
    """Check everything that a run with these flags needs, and print a line per finding.

    Leaves only a contact sheet in OUTPUT/doctor and the MLflow experiment `doctor`.

    Returns:
        The summary: `status`, the findings, and the measurements.

    Raises:
        LeaseError: another doctor checks the same output.
    """
    with ExitStack() as stack:
        with suppress(StorageError):  # an output that cannot be written is reported as a finding
            stack.enter_context(lease(storage.join(storage.absolute(config.run.output), "doctor")))
        return _examine(config)


def _examine(config: DoctorConfig) -> dict[str, Any]:
    report = Report()
    report.run("cluster", partial(resources.check_cluster, config))
    nodes = alive() if ray.is_initialized() else []
    described = versions.describe_nodes(nodes) if nodes else []
    if nodes:
        report.run("versions", lambda: versions.compare(nodes, described))
    config = _resolve(config, report, nodes)
    manifest, contents = _data(config, report, nodes)
    if manifest is None or contents is None:
        report.run("batch", lambda: [_skipped("batch", "train-data")])
        return report.summary()
    _model(config, report, nodes, manifest, contents)
    sample = _batch(config, report, manifest, contents)
    if sample is None:
        report.run("overfit", lambda: [_skipped("overfit", "batch")])
        return report.summary()
    _trial(config, report, nodes, described, manifest, sample)
    return report.summary()


def _resolve(config: DoctorConfig, report: Report, nodes: list[Node]) -> DoctorConfig:
    """Return the configuration with absolute URIs; one that cannot be resolved becomes empty."""
    tracking_uri, train_data = "", ""

    def resolve_tracking() -> list[Finding]:
        nonlocal tracking_uri
        tracking_uri = tracking.resolve_uri(config.tracking.tracking_uri)
        return []

    def resolve_data() -> list[Finding]:
        nonlocal train_data
        train_data = storage.absolute(config.data.train_data or embedded("train"))
        return []

    report.run("mlflow", resolve_tracking)
    report.run("train-data", resolve_data)
    resolved = override(
        config,
        train_data=train_data,
        val_data=storage.absolute(config.validation.val_data) if config.validation.val_data else "",
        output=storage.absolute(config.run.output),
        tracking_uri=tracking_uri,
    )
    if nodes:
        report.run("addresses", partial(reach.unshared_paths, resolved))
        report.run("output", partial(reach.output, resolved, nodes))
        if tracking_uri:
            report.run("mlflow", partial(reach.mlflow, tracking_uri, nodes))
    return resolved


def _data(config: DoctorConfig, report: Report, nodes: list[Node]) -> tuple[Manifest | None, Contents | None]:
    """Return the manifest and contents of the training set; None if it cannot be read."""
    train = (
        _read_set("train-data", config.data.train_data, config, report, nodes)
        if config.data.train_data
        else None
    )
    val = (
        _read_set("val-data", config.validation.val_data, config, report, nodes)
        if config.validation.val_data
        else None
    )
    if train is not None and val is not None:
        report.run("val-data", partial(data.validation_set, train[0], val[0]))
    return train or (None, None)


def _read_set(
    flag: str, uri: str, config: DoctorConfig, report: Report, nodes: list[Node]
) -> tuple[Manifest, Contents] | None:
    if nodes and not report.run(flag, partial(reach.data, flag, uri, nodes)):
        return None
    read: list[tuple[Manifest, Contents]] = []

    def survey() -> list[Finding]:
        manifest = Manifest.load(uri)
        read.append((manifest, shards.survey(manifest, config.checks.check_shards)))
        return []

    report.run(flag, survey)
    if not read:
        return None
    manifest, contents = read[0]
    report.run(flag, partial(data.integrity, flag, manifest, contents))
    for findings in (
        partial(data.faults, config, manifest),
        partial(data.labels, manifest, contents),
        partial(data.masks, config, flag, contents),
    ):
        report.run(flag, lambda findings=findings: (_label_check(flag, each) for each in findings()))  # type: ignore[misc]
    return manifest, contents


def _model(
    config: DoctorConfig, report: Report, nodes: list[Node], manifest: Manifest, contents: Contents
) -> None:
    num_queries, count = config.model.architecture.num_queries, 0

    def build() -> list[Finding]:
        nonlocal num_queries, count
        try:
            model = build_model(config, manifest)
        except (ValueError, RuntimeError, OSError) as error:
            raise ConfigError(f"the model cannot be built: {error}") from error
        num_queries = model.config.num_queries
        count = sum(parameter.numel() for parameter in model.parameters())
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        report.measurements["parameters"] = count
        text = f"{count / 1e6:.1f} million parameters, {trained / 1e6:.1f} million trainable"
        cautions = resolution_cautions(config, manifest, model)
        return [
            Finding("model", "ok", f"{text}, {len(manifest.id2label)} classes."),
            *(Finding("resolution", "warn", f"{each.problem}.", f"{each.remedy}.") for each in cautions),
        ]

    built = report.run("model", build)
    report.run("queries", partial(data.queries, config, num_queries, manifest, contents))
    if nodes and built:
        report.run("disk", partial(reach.free_space, config, 4 * count, nodes))


def _batch(
    config: DoctorConfig, report: Report, manifest: Manifest, contents: Contents
) -> batch.FirstBatches | None:
    if not data.is_trainable(manifest, contents):
        # The stream would fail on the first object without a category.
        report.run("batch", lambda: [_skipped("batch", "labels")])
        return None
    read: list[batch.FirstBatches] = []

    def first() -> list[Finding]:
        read.append(batch.first_batches(config, manifest))
        return list(batch.findings(config, read[0]))

    report.run("batch", first)
    if not read:
        return None
    file = storage.join(config.run.output, "doctor", "batch.png")
    report.measurements["picture"] = file
    report.run("picture", partial(batch.draw_contact_sheet, read[0], manifest.id2label, file))
    return read[0]


def _trial(
    config: DoctorConfig,
    report: Report,
    nodes: list[Node],
    described: list[NodeDescription | Exception],
    manifest: Manifest,
    sample: batch.FirstBatches,
) -> None:
    if "model" in report.names("FAIL"):
        report.run("overfit", lambda: [_skipped("overfit", "model")])
        return
    results: list[trial.TrialRun] = []

    def run() -> list[Finding]:
        results.append(trial.run(config, manifest, sample.batches))
        return list(trial.findings(config, results[0]))

    report.run("overfit", run)
    if not results:
        return
    cpus = sum(node.resources.get("CPU", 0) for node in nodes) or 1
    real = sum(each["cpus"] for each in described if not isinstance(each, Exception)) or 1
    speed = estimate.speed(config, results[0], sample.images_per_second, cpus, real)
    report.measurements |= estimate.summary_fields(config, manifest, results[0], speed)
    is_embedded = manifest.root == storage.absolute(f"{EMBEDDED_ROOT}/train")
    report.run("time", partial(estimate.findings, config, manifest, results[0], speed, cpus, is_embedded))
    if nodes:
        report.run("memory", partial(estimate.memory, config, results[0], nodes, described))


def _label_check(flag: str, finding: Finding) -> Finding:
    return replace(finding, check=f"val {finding.check}") if flag == "val-data" else finding


def _skipped(check: str, needed: str) -> Finding:
    return Finding(check, "warn", f"skipped, because {needed} failed.")
