"""Bound how many windows of a stream are in flight, so that they fit into Ray's object store.

What does not fit into the store is spilled to disk and read back. Rows leave the stream in the plan's order, so while
the rows of the first window in flight are consumed, all later windows wait in the store. Ray Data's own backpressure
does not prevent that: whenever a consumer waits for the first window, Ray Data lets another task finish a row. It does
not throttle the task that lists the windows either.
"""

import logging
import math
from dataclasses import dataclass
from typing import Any

import ray

from raydetr.data.shards import ROW_GROUP_SIZE
from raydetr.data.stream.plan import PlanSpec
from raydetr.ray_internals.data import BackpressurePolicy

ROW_BYTES = 128 * 1024 * 1024
"""Approximate bytes of pixels in a row. A row costs the scheduler and the worker about 10 ms whatever its size."""

_LOG = logging.getLogger(__name__)
_USABLE = 0.75
"""Share of the store to fill. Ray starts to spill at 0.8."""

_ASPECT = 1.6
"""Assumed ratio of the longer to the shorter side of an image, somewhat above the usual one."""

_ROWS_PER_WORKER = 4
"""Rows that a worker trains on, has prefetched, and is about to receive."""


WINDOWS_AHEAD = 1000
"""Windows that are listed ahead: more than a cluster has CPUs, and few compared with those of a long run."""


class WindowBackpressure(BackpressurePolicy):
    """Throttle the task that lists windows. All windows of a long run would fill the memory of the coordinator."""

    def max_task_output_bytes_to_read(self, op: Any) -> int | None:
        """Return None (no limit), or 0 for the listing task if enough windows are queued."""
        # The read operator is the one whose only input is Ray Data's InputDataBuffer, which has no inputs.
        is_read = op.input_dependencies and not op.input_dependencies[0].input_dependencies
        return 0 if is_read and self._topology[op].total_enqueued_output_blocks() >= WINDOWS_AHEAD else None


@dataclass(frozen=True)
class InFlight:
    """Limits of a stream in flight.

    row_bytes: approximate bytes of pixels in a row.
    tasks: maximum number of windows that are prepared concurrently; None: one per CPU.
    """

    row_bytes: int = ROW_BYTES
    tasks: int | None = None


def bound_concurrency(spec: PlanSpec, world_size: int, store_bytes: float, cpus: float) -> InFlight:
    """Compute the row size and the number of concurrent tasks that fit into the object store.

    Args:
        spec: spec of the plan; gives the approximate number of pixels in a window.
        world_size: number of training workers, each of which holds a few rows.
        store_bytes: size of the object stores of all nodes together.
        cpus: number of CPUs of all nodes together.
    """
    usable = _USABLE * store_bytes
    row_bytes = min(ROW_BYTES, int(usable / 2 / (_ROWS_PER_WORKER * world_size)))
    edges = spec.augmentation.shortest_edges
    shorter = sum(edges) / len(edges)
    longer = min(_ASPECT * shorter, spec.augmentation.longest_edge)
    window_bytes = spec.window_row_groups * ROW_GROUP_SIZE * 3 * shorter * longer
    # The first window needs no space of its own: its rows are the ones that the workers hold.
    waiting = (usable - _ROWS_PER_WORKER * world_size * row_bytes) / window_bytes
    tasks = 1 + math.floor(max(waiting, 0))
    return InFlight(row_bytes, tasks if tasks < cpus else None)


def fit_cluster(spec: PlanSpec, world_size: int) -> InFlight:
    """Call `bound_concurrency` for the cluster that this process is connected to. Warn if the store is the limit."""
    resources = ray.cluster_resources()
    store, cpus = resources["object_store_memory"], resources.get("CPU", 1)
    bounds = bound_concurrency(spec, world_size, store, cpus)
    if bounds.tasks is not None:
        _LOG.warning(
            "The object store (%.1f GiB) has room for the output of %d of the %d CPUs: give Ray a larger store "
            "(`ray start --object-store-memory`) or lower --window-row-groups.",
            store / 2**30,
            bounds.tasks,
            cpus,
        )
    return bounds
