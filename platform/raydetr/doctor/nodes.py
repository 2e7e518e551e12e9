"""The nodes of the cluster, and tasks that run on a certain one of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydetr.doctor import on_node

PATIENCE_S = 120.0
"""How long a node has for a check, the start of a process there included."""


@dataclass(frozen=True)
class Node:
    """A node that is alive."""

    node_id: str
    address: str
    resources: dict[str, float]
    is_driver: bool

    @property
    def name(self) -> str:
        """For messages: nodes can share an address."""
        return f"{self.address} ({self.node_id[:6]})"


def alive() -> list[Node]:
    """The nodes, this process's first."""
    own = ray.get_runtime_context().get_node_id()
    found = [
        Node(each["NodeID"], each["NodeManagerAddress"], each["Resources"], each["NodeID"] == own)
        for each in ray.nodes()
        if each["Alive"]
    ]
    return sorted(found, key=lambda node: (not node.is_driver, node.address, node.node_id))


def on_each(
    nodes: Sequence[Node], action: Callable[..., Any], *arguments: Any, by_value: bool = False
) -> list[Any]:
    """What a function returns on every node, or what went wrong there.

    Args:
        nodes: where to.
        action: takes no CPU from the scheduler, so it runs on a cluster that is busy.
        arguments: of it.
        by_value: send the code of its module along; else each node imports its own.

    Returns:
        for each node what the function returned, or the exception.
    """
    if by_value:
        cloudpickle.register_pickle_by_value(on_node)
    try:
        references = [
            ray.remote(num_cpus=0, max_retries=0)(action)
            .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False))
            .remote(*arguments)
            for node in nodes
        ]
    finally:
        if by_value:
            cloudpickle.unregister_pickle_by_value(on_node)
    if not references:
        return []
    ray.wait(references, num_returns=len(references), timeout=PATIENCE_S)
    return [_outcome(reference) for reference in references]


def _outcome(reference: Any) -> Any:
    try:
        return ray.get(reference, timeout=0.1)
    except ray.exceptions.GetTimeoutError:
        ray.cancel(reference, force=True)
        return TimeoutError(f"no answer within {PATIENCE_S:.0f} s")
    except ray.exceptions.RayTaskError as error:
        return error.cause if isinstance(error.cause, Exception) else error
    except ray.exceptions.RayError as error:
        return error
