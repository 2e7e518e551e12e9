"""Check that the cluster has the resources for workers, data tasks and validation."""

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
from raydetr.training.trainer import can_validate_in_background, connect_for_training

GIB = 2**30


def check_cluster(config: TrainConfig) -> Iterator[Finding]:
    """Connect as the run would, and compare the cluster's resources with what the run needs."""
    failed = ""
    try:
        connect_for_training(config)
    except (ClusterError, ConnectionError) as error:
        if not ray.is_initialized():
            yield Finding("cluster", "FAIL", f"no cluster to connect to: {error}")
            return
        failed = str(error)
    nodes, available = alive(), ray.cluster_resources()
    resources = (
        f"{len(nodes)} node{'s' * (len(nodes) > 1)}, {available.get('CPU', 0):g} CPUs, "
        f"{available.get('GPU', 0):g} GPUs, {available.get('memory', 0) / GIB:.1f} GiB of memory, "
        f"{available.get('object_store_memory', 0) / GIB:.2f} GiB of object store"
    )
    needed = f"{config.cluster.workers} workers and {config.cluster.data_cpus} data tasks"
    if failed:
        yield Finding("cluster", "FAIL", f"{resources}. {failed}")
    else:
        yield Finding("cluster", "ok", f"{resources}; enough for {needed}.")
    yield from _cpus_for_data(config, available.get("CPU", 0))
    yield from _gpus(config, nodes)
    yield from _in_use(config)
    yield object_store(config, available.get("object_store_memory", 0), available.get("CPU", 1))
    yield from _validation(config)


def object_store(config: TrainConfig, store_bytes: float, cpus: float) -> Finding:
    """Check that the object stores hold the rows of all workers, and those that all data tasks prepare."""
    spec = plan_spec(config)
    bounds = in_flight.bound_concurrency(spec, config.cluster.workers, store_bytes, cpus)
    edges = spec.augmentation
    largest = max(edges.shortest_edges)
    batch_bytes = spec.micro_batch_size * 3 * largest * min(1.6 * largest, edges.longest_edge)
    size = f"{store_bytes / GIB:.2f} GiB"
    remedy = (
        "give Ray a larger object store (`ray start --object-store-memory`, or nodes with more memory), or lower "
        "--window-row-groups or --micro-batch-size."
    )
    if bounds.row_bytes < batch_bytes:
        return Finding(
            "object store",
            "FAIL",
            f"{size} is too small: a micro-batch has up to {batch_bytes / 2**20:.0f} MiB, and {config.cluster.workers} workers "
            f"hold several each.",
            remedy,
        )
    if bounds.tasks is not None:
        return Finding(
            "object store",
            "warn",
            f"{size} is enough for {bounds.tasks} of {cpus:g} CPUs that prepare images; the others wait.",
            remedy,
        )
    return Finding("object store", "ok", f"{size} is enough for all CPUs that prepare images.")


def _cpus_for_data(config: TrainConfig, cpus: float) -> Iterator[Finding]:
    left = cpus - config.cluster.workers
    if left < 1:
        yield Finding(
            "data CPUs",
            "FAIL",
            f"{config.cluster.workers} workers use all {cpus:g} CPUs and leave none for data tasks: the run would hang.",
            "add a node with CPUs, or lower --workers.",
        )


def _gpus(config: TrainConfig, nodes: Sequence[Node]) -> Iterator[Finding]:
    """Check that enough nodes have both a CPU and a GPU for a worker."""
    gpus = sum(node.resources.get("GPU", 0) for node in nodes)
    if config.cluster.accelerator == "cpu":
        if gpus:
            yield Finding(
                "GPUs", "warn", f"the cluster has {gpus:g}, but the run uses none.", "give --accelerator gpu."
            )
        return
    slots = int(sum(min(node.resources.get("GPU", 0), node.resources.get("CPU", 0)) for node in nodes))
    if slots < config.cluster.workers:
        yield Finding(
            "GPUs",
            "FAIL",
            f"the nodes have room for {slots} workers with a CPU and a GPU each, but --workers is {config.cluster.workers}.",
            f"lower --workers to {slots} or add GPU nodes."
            if slots
            else "add GPU nodes, or give --accelerator cpu.",
        )
    else:
        yield Finding("GPUs", "ok", f"{gpus:g}, enough for {config.cluster.workers} workers.")


def _in_use(config: TrainConfig) -> Iterator[Finding]:
    free = ray.available_resources().get("CPU", 0)
    if ray.cluster_resources().get("CPU", 0) >= config.cluster.workers + config.cluster.data_cpus > free:
        yield Finding(
            "cluster",
            "warn",
            f"only {free:g} CPUs are free now: the run would wait for other jobs.",
            "run `ray status` to see what uses them.",
        )


def _validation(config: TrainConfig) -> Iterator[Finding]:
    if not config.checkpoints.validate_every:
        return
    with contextlib.redirect_stdout(io.StringIO()) as message:
        in_background = can_validate_in_background(config)
    if in_background:
        yield Finding("validation", "ok", "runs in the background, in a separate task.")
    else:
        yield Finding(
            "validation",
            "warn",
            message.getvalue().strip(),
            "add CPUs (GPUs), or lower --validation-cpus, --data-cpus or --workers; or accept the pauses.",
        )
