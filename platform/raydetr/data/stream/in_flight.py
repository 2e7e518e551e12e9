"""How much of a stream may be under way at once.

What does not fit into the object store is written to disk and read again. Rows leave in the plan's order. So while the
first window under way is dealt out, those after it wait in the store as a whole, and Ray Data's own limits do not hold
them back: as often as a consumer waits for the first, it lets another finish a row. Nor do they hold back what lists
the windows.
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
"""Pixels of a row, about: a row costs the scheduler and the worker some 10 ms by itself, whatever its size."""

_LOG = logging.getLogger(__name__)
_USABLE = 0.75
"""Share of the store to fill: Ray begins to spill at 0.8."""

_ASPECT = 1.6
"""Longer to shorter side of an image, rather more than the usual."""

_ROWS_A_WORKER = 4
"""Rows that a worker trains on, has fetched ahead, and is about to get."""


WINDOWS_AHEAD = 1000
"""Windows listed before they are worked on: more than the CPUs of a cluster, and few beside those of a long run."""


class WindowBackpressure(BackpressurePolicy):
    """Holds back the task that lists windows: all those of a long run would fill the memory of the coordinator."""

    def max_task_output_bytes_to_read(self, op: Any) -> int | None:
        """No limit, or no bytes where enough windows wait."""
        reads = op.input_dependencies and not op.input_dependencies[0].input_dependencies
        return 0 if reads and self._topology[op].total_enqueued_output_blocks() >= WINDOWS_AHEAD else None


@dataclass(frozen=True)
class InFlight:
    """Bounds of what is under way.

    row_bytes: pixels of a row, about.
    tasks: windows that are worked on at a time; None: one a CPU.
    """

    row_bytes: int = ROW_BYTES
    tasks: int | None = None


def bound_concurrency(spec: PlanSpec, world_size: int, store_bytes: float, cpus: float) -> InFlight:
    """What fits into an object store.

    Args:
        spec: of the plan, which says how many pixels a window has, about.
        world_size: workers, each of which holds some rows.
        store_bytes: size of the store, of all nodes.
        cpus: of all nodes.
    """
    usable = _USABLE * store_bytes
    row_bytes = min(ROW_BYTES, int(usable / 2 / (_ROWS_A_WORKER * world_size)))
    edges = spec.augmentation.shortest_edges
    shorter = sum(edges) / len(edges)
    longer = min(_ASPECT * shorter, spec.augmentation.longest_edge)
    window_bytes = spec.window_row_groups * ROW_GROUP_SIZE * 3 * shorter * longer
    # The first window needs no room of its own: its rows are those of the workers.
    waiting = (usable - _ROWS_A_WORKER * world_size * row_bytes) / window_bytes
    tasks = 1 + math.floor(max(waiting, 0))
    return InFlight(row_bytes, tasks if tasks < cpus else None)


def fit_cluster(spec: PlanSpec, world_size: int) -> InFlight:
    """What fits into the object stores of the cluster that this process is connected to."""
    there = ray.cluster_resources()
    store, cpus = there["object_store_memory"], there.get("CPU", 1)
    bounds = bound_concurrency(spec, world_size, store, cpus)
    if bounds.tasks is not None:
        _LOG.warning(
            "The object store (%.1f GiB) holds what %d of %d CPUs prepare: give Ray a larger one "
            "(--object-store-memory of `ray start`) or lower --window-row-groups.",
            store / 2**30,
            bounds.tasks,
            cpus,
        )
    return bounds
