"""Whether the cluster has what workers, data tasks and validation need."""

import contextlib
import io
from collections.abc import Iterator, Sequence

import ray

from raydetr.data.stream import in_flight
from raydetr.doctor.findings import Finding
from raydetr.doctor.nodes import Node, alive
from raydetr.errors import ClusterError
from raydetr.training.config import TrainConfig
from raydetr.training.run import plan_spec
from raydetr.training.trainer import connect_for_training, validates_in_background

GIB = 2**30


def check_cluster(config: TrainConfig) -> Iterator[Finding]:
    """Connect as the run would, and compare what there is with what it needs."""
    failed = ""
    try:
        connect_for_training(config)
    except (ClusterError, ConnectionError) as error:
        if not ray.is_initialized():
            yield Finding("cluster", "FAIL", f"no cluster to connect to: {error}")
            return
        failed = str(error)
    nodes, there = alive(), ray.cluster_resources()
    found = (
        f"{len(nodes)} node{'s' * (len(nodes) > 1)}, {there.get('CPU', 0):g} CPUs, {there.get('GPU', 0):g} GPUs, "
        f"{there.get('memory', 0) / GIB:.1f} GiB of memory, "
        f"{there.get('object_store_memory', 0) / GIB:.2f} GiB of object store"
    )
    needed = f"{config.workers} workers and {config.data_cpus} data tasks"
    if failed:
        yield Finding("cluster", "FAIL", f"{found}. {failed}")
    else:
        yield Finding("cluster", "ok", f"{found}; enough for {needed}.")
    yield from _cpus_for_data(config, there.get("CPU", 0))
    yield from _places(config, nodes)
    yield from _in_use(config)
    yield object_store(config, there.get("object_store_memory", 0), there.get("CPU", 1))
    yield from _validation(config)


def object_store(config: TrainConfig, store_bytes: float, cpus: float) -> Finding:
    """Whether the rows of all workers fit into the object stores, and what the data tasks prepare besides."""
    spec = plan_spec(config)
    bounds = in_flight.bound_concurrency(spec, config.workers, store_bytes, cpus)
    edges = spec.augmentation
    largest = max(edges.shortest_edges)
    batch_bytes = spec.micro_batch_size * 3 * largest * min(1.6 * largest, edges.longest_edge)
    size = f"{store_bytes / GIB:.2f} GiB"
    remedy = (
        "give Ray a larger one (--object-store-memory of `ray start`, or nodes with more memory), or lower "
        "--window-row-groups or --micro-batch-size."
    )
    if bounds.row_bytes < batch_bytes:
        return Finding(
            "object store",
            "FAIL",
            f"{size} is too small: a micro-batch has up to {batch_bytes / 2**20:.0f} MiB, and {config.workers} workers "
            f"hold several each.",
            remedy,
        )
    if bounds.tasks is not None:
        return Finding(
            "object store",
            "warn",
            f"{size} holds what {bounds.tasks} of {cpus:g} CPUs prepare; the others wait.",
            remedy,
        )
    return Finding("object store", "ok", f"{size} holds what all CPUs prepare.")


def _cpus_for_data(config: TrainConfig, cpus: float) -> Iterator[Finding]:
    left = cpus - config.workers
    if left < 1:
        yield Finding(
            "data CPUs",
            "FAIL",
            f"{config.workers} workers hold all {cpus:g} CPUs and leave none to the data stream, which would wait for "
            "ever.",
            "add a node with CPUs, or lower --workers.",
        )


def _places(config: TrainConfig, nodes: Sequence[Node]) -> Iterator[Finding]:
    """GPUs on the nodes on which the workers' CPUs are."""
    gpus = sum(node.resources.get("GPU", 0) for node in nodes)
    if config.accelerator == "cpu":
        if gpus:
            yield Finding(
                "GPUs", "warn", f"the cluster has {gpus:g} and the run uses none.", "give --accelerator gpu."
            )
        return
    places = int(sum(min(node.resources.get("GPU", 0), node.resources.get("CPU", 0)) for node in nodes))
    if places < config.workers:
        yield Finding(
            "GPUs",
            "FAIL",
            f"the nodes have room for {places} workers with a CPU and a GPU each; --workers is {config.workers}.",
            f"lower --workers to {places} or add GPU nodes."
            if places
            else "add GPU nodes, or --accelerator cpu.",
        )
    else:
        yield Finding("GPUs", "ok", f"{gpus:g}, a place for each of {config.workers} workers.")


def _in_use(config: TrainConfig) -> Iterator[Finding]:
    free = ray.available_resources().get("CPU", 0)
    if ray.cluster_resources().get("CPU", 0) >= config.workers + config.data_cpus > free:
        yield Finding(
            "cluster",
            "warn",
            f"only {free:g} CPUs are free at the moment: the run would wait for other jobs.",
            "`ray status` shows who holds them.",
        )


def _validation(config: TrainConfig) -> Iterator[Finding]:
    if not config.validate_every:
        return
    with contextlib.redirect_stdout(io.StringIO()) as said:
        beside = validates_in_background(config)
    if beside:
        yield Finding("validation", "ok", "runs beside training, in a task of its own.")
    else:
        yield Finding(
            "validation",
            "warn",
            said.getvalue().strip(),
            "add CPUs (GPUs), or lower --validation-cpus, --data-cpus or --workers; or leave it so.",
        )
