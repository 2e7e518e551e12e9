"""Whether every node reaches what the run reads and writes: the output, the data, MLflow."""

import uuid
from collections.abc import Iterator, Sequence

from raydetr import cluster, storage
from raydetr.data.shards import MANIFEST
from raydetr.doctor import on_node
from raydetr.doctor.findings import Finding
from raydetr.doctor.nodes import Node, on_each
from raydetr.errors import ClusterError, RaydetrError, StorageError
from raydetr.registry import tracking
from raydetr.training.config import TrainConfig

EXPERIMENT = "doctor"
_GIVE_ANOTHER = "give an --output that every node can write to, or mend its permissions."


def local_addresses(config: TrainConfig) -> Iterator[Finding]:
    """Addresses that only one of several nodes has."""
    named = {"train_data": config.train_data, "output": config.output, "tracking_uri": config.tracking_uri}
    if config.val_data:
        named["val_data"] = config.val_data
    if config.model and "://" not in config.model and not config.model.startswith(("models:", "hub:")):
        named["model"] = config.model
    failed = False
    for flag, address in named.items():
        if not address:
            continue  # it could not be resolved, which is said where it was tried
        try:
            cluster.require_shared(**{flag: address})
        except ClusterError as error:
            failed = True
            yield Finding("addresses", "FAIL", str(error))
    if not failed:
        nodes = cluster.nodes()
        yield Finding(
            "addresses",
            "ok",
            "one node, which has them all." if nodes == 1 else f"all are shared by the {nodes} nodes.",
        )


def output(config: TrainConfig, nodes: Sequence[Node]) -> Iterator[Finding]:
    """Write a file from every node, read each of them from every node, delete them."""
    folder = storage.join(config.output, "doctor", f"probe-{uuid.uuid4().hex[:8]}")
    failed = False
    try:
        written = on_each(nodes, write_probe, folder)
        for node, found in zip(nodes, written, strict=True):
            if isinstance(found, Exception):
                failed = True
                yield Finding(
                    "output",
                    "FAIL",
                    f"node {node.name} cannot write to {config.output}: {found}",
                    _GIVE_ANOTHER,
                )
        there = [found for found in written if not isinstance(found, Exception)]
        for node, found in zip(
            nodes, on_each(nodes, read_probes, there) if there else [], strict=bool(there)
        ):
            if isinstance(found, Exception):
                failed = True
                yield Finding(
                    "output",
                    "FAIL",
                    f"node {node.name} cannot read what another wrote to {config.output}: {found}",
                    "give an --output that all nodes share, such as s3://.",
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
            else f"written from {len(nodes)} nodes, read from all others"
        )
        yield Finding("output", "ok", f"{config.output}: {pairs}.")


def data(flag: str, address: str, nodes: Sequence[Node]) -> Iterator[Finding]:
    """Read the manifest from every node; the shards are read by `shards.examine`, wherever a task runs."""
    failed = False
    for node, found in zip(nodes, on_each(nodes, read_manifest, address), strict=True):
        if isinstance(found, Exception):
            failed = True
            yield Finding(
                flag,
                "FAIL",
                f"node {node.name} cannot read {address}: {found}",
                f"give a --{flag} that every node can read, and the credentials for it.",
            )
    if not failed:
        yield Finding(flag, "ok", f"{address}: readable from {_every(nodes)}.")


def mlflow(uri: str, nodes: Sequence[Node]) -> Iterator[Finding]:
    """Look up experiments from every node; open a run from here, and delete it."""
    failed = False
    # One first: several that find a new database would each make its tables.
    asked = [found for some in (nodes[:1], nodes[1:]) for found in on_each(some, search_experiments, uri)]
    for node, found in zip(nodes, asked, strict=True):
        if isinstance(found, Exception):
            failed = True
            yield Finding(
                "mlflow",
                "FAIL",
                f"node {node.name} does not reach {uri}: {found}",
                "open the way from that node to the server, or give another --tracking-uri.",
            )
    if not failed:
        run_id = tracking.start_run(uri, EXPERIMENT, "probe", {}, {})
        tracking.log_metrics(uri, run_id, [(0, {"probe": 1.0})])
        with tracking.registry_errors(uri):
            tracking.client(uri).delete_run(run_id)
        yield Finding("mlflow", "ok", f"{uri}: reached from {_every(nodes)}, a run opened and deleted.")


def free_space(config: TrainConfig, model_bytes: int, nodes: Sequence[Node]) -> Iterator[Finding]:
    """Whether the checkpoints that are kept fit on the disk of a local output.

    Args:
        config: of the run.
        model_bytes: of the trained model's weights.
        nodes: the run's.
    """
    if "://" in config.output:
        return
    (found,) = on_each(nodes[:1], on_node.room, config.output, by_value=True)
    if isinstance(found, Exception):
        raise found
    # Weights, their average, two moments of the optimiser; the best, and the one being written, besides those kept.
    needed = 4 * model_bytes * (config.keep_checkpoints + 2)
    text = f"{found[0] / 2**30:.1f} GiB free at {config.output}, checkpoints need about {needed / 2**30:.1f}."
    if found[0] < needed:
        yield Finding("disk", "FAIL", text, "make room, lower --keep-checkpoints, or give another --output.")
    else:
        yield Finding("disk", "ok", text)


def _every(nodes: Sequence[Node]) -> str:
    return "the one node" if len(nodes) == 1 else f"all {len(nodes)} nodes"


def write_probe(folder: str) -> str:
    """Write a file of this node's; returns its address."""
    address = storage.join(folder, uuid.uuid4().hex)
    storage.write_bytes(address, address.encode())
    return address


def read_probes(addresses: Sequence[str]) -> None:
    """Read the files of all nodes.

    Raises:
        StorageError: one of them is not there, or not what was written.
    """
    for address in addresses:
        if storage.read_bytes(address) != address.encode():
            raise StorageError(f"{address}: not what was written to it.")


def read_manifest(address: str) -> None:
    """Read the manifest's text."""
    storage.read_bytes(storage.join(address, MANIFEST))


def search_experiments(uri: str) -> None:
    """Ask MLflow for an experiment.

    Raises:
        RegistryError: it does not answer.
    """
    uri = tracking.resolve_uri(uri)
    with tracking.registry_errors(uri):
        tracking.client(uri).search_experiments(max_results=1)
