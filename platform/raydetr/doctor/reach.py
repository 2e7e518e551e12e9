"""Check that every node can reach what the run reads and writes: the output, the data, MLflow."""

import uuid
from collections.abc import Iterator, Sequence

from raydetr import cluster, storage
from raydetr.data.shards import MANIFEST
from raydetr.doctor import on_node
from raydetr.doctor.findings import Finding
from raydetr.doctor.nodes import Node, on_each
from raydetr.errors import ClusterError, RaydetrError, StorageError
from raydetr.registry import models, tracking
from raydetr.training.config import TrainConfig

EXPERIMENT = "doctor"
_GIVE_ANOTHER = "give an --output that every node can write to, or fix its permissions."


def unshared_paths(config: TrainConfig) -> Iterator[Finding]:
    """Report local paths that only one of several nodes has."""
    named = {
        "train_data": config.data.train_data,
        "output": config.run.output,
        "tracking_uri": config.tracking.tracking_uri,
    }
    if config.validation.val_data:
        named["val_data"] = config.validation.val_data
    if models.is_path(config.model.model):
        named["model"] = config.model.model
    failed = False
    for flag, uri in named.items():
        if not uri:
            continue  # could not be resolved, which is already a finding
        try:
            cluster.require_shared(**{flag: uri})
        except ClusterError as error:
            failed = True
            yield Finding("addresses", "FAIL", str(error))
    if not failed:
        nodes = cluster.nodes()
        yield Finding(
            "addresses",
            "ok",
            "a single node, so local paths work." if nodes == 1 else f"all {nodes} nodes share them.",
        )


def output(config: TrainConfig, nodes: Sequence[Node]) -> Iterator[Finding]:
    """Write a file from every node, read all of them from every node, then delete them."""
    folder = storage.join(config.run.output, "doctor", f"probe-{uuid.uuid4().hex[:8]}")
    failed = False
    try:
        written = on_each(nodes, write_probe, folder)
        for node, file in zip(nodes, written, strict=True):
            if isinstance(file, Exception):
                failed = True
                yield Finding(
                    "output",
                    "FAIL",
                    f"node {node.name} cannot write to {config.run.output}: {file}",
                    _GIVE_ANOTHER,
                )
        files = [result for result in written if not isinstance(result, Exception)]
        for node, result in zip(
            nodes, on_each(nodes, read_probes, files) if files else [], strict=bool(files)
        ):
            if isinstance(result, Exception):
                failed = True
                yield Finding(
                    "output",
                    "FAIL",
                    f"node {node.name} cannot read files that another node wrote to {config.run.output}: {result}",
                    "give an --output that all nodes share, for example s3://.",
                )
    finally:
        try:
            storage.delete_folder(folder)
        except RaydetrError as error:
            yield Finding("output", "warn", f"the probe files in {folder} cannot be deleted: {error}")
    if not failed:
        pairs = (
            "written and read"
            if len(nodes) == 1
            else f"written from {len(nodes)} nodes, read from all of them"
        )
        yield Finding("output", "ok", f"{config.run.output}: {pairs}.")


def data(flag: str, uri: str, nodes: Sequence[Node]) -> Iterator[Finding]:
    """Read the manifest from every node. `shards.survey` reads the shards, on any node."""
    failed = False
    for node, result in zip(nodes, on_each(nodes, read_manifest, uri), strict=True):
        if isinstance(result, Exception):
            failed = True
            yield Finding(
                flag,
                "FAIL",
                f"node {node.name} cannot read {uri}: {result}",
                f"give a --{flag} that every node can read, and its credentials.",
            )
    if not failed:
        yield Finding(flag, "ok", f"{uri}: readable from {_every(nodes)}.")


def mlflow(uri: str, nodes: Sequence[Node]) -> Iterator[Finding]:
    """Search MLflow experiments from every node; create and delete a run from this one."""
    failed = False
    # One node first: several would create the tables of a new database concurrently.
    results = [result for some in (nodes[:1], nodes[1:]) for result in on_each(some, search_experiments, uri)]
    for node, result in zip(nodes, results, strict=True):
        if isinstance(result, Exception):
            failed = True
            yield Finding(
                "mlflow",
                "FAIL",
                f"node {node.name} cannot reach {uri}: {result}",
                "allow connections from that node to the server, or give another --tracking-uri.",
            )
    if not failed:
        run_id = tracking.start_run(uri, EXPERIMENT, "probe", {}, {})
        tracking.log_metrics(uri, run_id, [(0, {"probe": 1.0})])
        with tracking.registry_errors(uri):
            tracking.client(uri).delete_run(run_id)
        yield Finding("mlflow", "ok", f"{uri}: reachable from {_every(nodes)}, a run created and deleted.")


def free_space(config: TrainConfig, model_bytes: int, nodes: Sequence[Node]) -> Iterator[Finding]:
    """Check that the retained checkpoints fit on the disk of a local output.

    Args:
        config: configuration of the run.
        model_bytes: size of the model's weights in bytes.
        nodes: nodes of the cluster.
    """
    if "://" in config.run.output:
        return
    (result,) = on_each(nodes[:1], on_node.disk_space, config.run.output, by_value=True)
    if isinstance(result, Exception):
        raise result
    # A checkpoint has the weights, their average and two optimizer moments. In addition to the latest checkpoints, the
    # disk holds the best one and the one being written.
    needed = 4 * model_bytes * (config.checkpoints.keep_checkpoints + 2)
    text = f"{result[0] / 2**30:.1f} GiB free at {config.run.output}, checkpoints need about {needed / 2**30:.1f}."
    if result[0] < needed:
        yield Finding(
            "disk", "FAIL", text, "free disk space, lower --keep-checkpoints, or give another --output."
        )
    else:
        yield Finding("disk", "ok", text)


def _every(nodes: Sequence[Node]) -> str:
    return "the one node" if len(nodes) == 1 else f"all {len(nodes)} nodes"


def write_probe(folder: str) -> str:
    """Write a file that contains its own URI; return the URI."""
    uri = storage.join(folder, uuid.uuid4().hex)
    storage.write_bytes(uri, uri.encode())
    return uri


def read_probes(uris: Sequence[str]) -> None:
    """Read the files of all nodes.

    Raises:
        StorageError: a file is missing or has other content.
    """
    for uri in uris:
        if storage.read_bytes(uri) != uri.encode():
            raise StorageError(f"{uri}: its content is not what was written.")


def read_manifest(uri: str) -> None:
    """Read the bytes of a manifest."""
    storage.read_bytes(storage.join(uri, MANIFEST))


def search_experiments(uri: str) -> None:
    """Search for an MLflow experiment.

    Raises:
        RegistryError: MLflow does not answer.
    """
    uri = tracking.resolve_uri(uri)
    with tracking.registry_errors(uri):
        tracking.client(uri).search_experiments(max_results=1)
