"""The order of the checks, and which need what an earlier one found."""

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
from raydetr.doctor.shards import Contents
from raydetr.errors import ConfigError, StorageError
from raydetr.lease import lease
from raydetr.registry import tracking
from raydetr.training.model import build_model
from raydetr.training.preview import resolution_cautions


def examine(config: DoctorConfig) -> dict[str, Any]:
    """Look at everything that a run with these flags needs, and print a line for each finding.

    Nothing is left behind but a picture in OUTPUT/doctor and the MLflow experiment `doctor`.

    Returns:
        The summary: `status`, the findings, the figures.

    Raises:
        LeaseError: another doctor examines the same output.
    """
    with ExitStack() as stack:
        with suppress(StorageError):  # an output that cannot be written is one of the findings
            stack.enter_context(lease(storage.join(storage.absolute(config.output), "doctor")))
        return _examine(config)


def _examine(config: DoctorConfig) -> dict[str, Any]:
    report = Report()
    report.run("cluster", partial(resources.check_cluster, config))
    nodes = alive() if ray.is_initialized() else []
    described = versions.describe_nodes(nodes) if nodes else []
    if nodes:
        report.run("versions", lambda: versions.compare(nodes, described))
    config = _addresses(config, report, nodes)
    manifest, contents = _data(config, report, nodes)
    if manifest is None or contents is None:
        report.run("batch", lambda: [_not_made("batch", "train-data")])
        return report.summary()
    _model(config, report, nodes, manifest, contents)
    drawn = _batch(config, report, manifest, contents)
    if drawn is None:
        report.run("overfit", lambda: [_not_made("overfit", "batch")])
        return report.summary()
    _trial(config, report, nodes, described, manifest, drawn)
    return report.summary()


def _addresses(config: DoctorConfig, report: Report, nodes: list[Node]) -> DoctorConfig:
    """The configuration with its addresses absolute, an empty one where it cannot be resolved."""
    uri, data_address = "", ""

    def resolve_tracking() -> list[Finding]:
        nonlocal uri
        uri = tracking.resolve_uri(config.tracking_uri)
        return []

    def resolve_data() -> list[Finding]:
        nonlocal data_address
        data_address = storage.absolute(config.train_data or embedded("train"))
        return []

    report.run("mlflow", resolve_tracking)
    report.run("train-data", resolve_data)
    resolved = replace(
        config,
        train_data=data_address,
        val_data=storage.absolute(config.val_data) if config.val_data else "",
        output=storage.absolute(config.output),
        tracking_uri=uri,
    )
    if nodes:
        report.run("addresses", partial(reach.local_addresses, resolved))
        report.run("output", partial(reach.output, resolved, nodes))
        if uri:
            report.run("mlflow", partial(reach.mlflow, uri, nodes))
    return resolved


def _data(config: DoctorConfig, report: Report, nodes: list[Node]) -> tuple[Manifest | None, Contents | None]:
    """Manifest and contents of the training set, None where it cannot be read."""
    train = _read_set("train-data", config.train_data, config, report, nodes) if config.train_data else None
    val = _read_set("val-data", config.val_data, config, report, nodes) if config.val_data else None
    if train is not None and val is not None:
        report.run("val-data", partial(data.validation_set, train[0], val[0]))
    return train or (None, None)


def _read_set(
    flag: str, address: str, config: DoctorConfig, report: Report, nodes: list[Node]
) -> tuple[Manifest, Contents] | None:
    if nodes and not report.run(flag, partial(reach.data, flag, address, nodes)):
        return None
    read: list[tuple[Manifest, Contents]] = []

    def survey() -> list[Finding]:
        manifest = Manifest.load(address)
        read.append((manifest, shards.survey(manifest, config.check_shards)))
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
        report.run(flag, lambda findings=findings: (_of_set(flag, each) for each in findings()))  # type: ignore[misc]
    return manifest, contents


def _model(
    config: DoctorConfig, report: Report, nodes: list[Node], manifest: Manifest, contents: Contents
) -> None:
    num_queries = config.num_queries

    def build() -> list[Finding]:
        nonlocal num_queries
        try:
            model = build_model(config, manifest)
        except (ValueError, RuntimeError, OSError) as error:
            raise ConfigError(f"it cannot be built: {error}") from error
        num_queries = model.config.num_queries
        count = sum(parameter.numel() for parameter in model.parameters())
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        report.figures["parameters"] = count
        text = f"{count / 1e6:.1f} million parameters, {trained / 1e6:.1f} of them trained"
        cautions = resolution_cautions(config, manifest, model)
        return [
            Finding("model", "ok", f"{text}, {len(manifest.id2label)} classes."),
            *(Finding("resolution", "warn", f"{each.found}.", f"{each.remedy}.") for each in cautions),
        ]

    built = report.run("model", build)
    report.run("queries", partial(data.queries, config, num_queries, manifest, contents))
    if nodes and built:
        report.run("disk", partial(reach.free_space, config, 4 * report.figures["parameters"], nodes))


def _batch(
    config: DoctorConfig, report: Report, manifest: Manifest, contents: Contents
) -> batch.Drawn | None:
    if not data.is_trainable(manifest, contents):
        # The stream would end on the first object without a category.
        report.run("batch", lambda: [_not_made("batch", "labels")])
        return None
    made: list[batch.Drawn] = []

    def first() -> list[Finding]:
        made.append(batch.first_batches(config, manifest))
        return list(batch.findings(config, made[0]))

    report.run("batch", first)
    if not made:
        return None
    file = storage.join(config.output, "doctor", "batch.png")
    report.figures["picture"] = file
    report.run("picture", partial(batch.picture, made[0], manifest.id2label, file))
    return made[0]


def _trial(
    config: DoctorConfig,
    report: Report,
    nodes: list[Node],
    described: list[Any],
    manifest: Manifest,
    drawn: batch.Drawn,
) -> None:
    if "model" in report.names("FAIL"):
        report.run("overfit", lambda: [_not_made("overfit", "model")])
        return
    made: list[trial.TrialRun] = []

    def run() -> list[Finding]:
        made.append(trial.run(config, manifest, drawn.batches))
        return list(trial.finding(config, made[0]))

    report.run("overfit", run)
    if not made:
        return
    cpus = sum(node.resources.get("CPU", 0) for node in nodes) or 1
    real = sum(each["cpus"] for each in described if isinstance(each, dict)) or 1
    speed = estimate.speed(config, made[0], drawn.images_per_second, cpus, real)
    report.figures |= estimate.figures(config, manifest, made[0], speed)
    is_embedded = manifest.root == storage.absolute(f"{EMBEDDED_ROOT}/train")
    report.run("time", partial(estimate.findings, config, manifest, made[0], speed, cpus, is_embedded))
    if nodes:
        report.run("memory", partial(estimate.memory, config, made[0], nodes, described))


def _of_set(flag: str, finding: Finding) -> Finding:
    return replace(finding, check=f"val {finding.check}") if flag == "val-data" else finding


def _not_made(check: str, needed: str) -> Finding:
    return Finding(check, "warn", f"not made, since it needs what failed: {needed}.")
