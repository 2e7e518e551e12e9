"""List the nodes of the cluster, and run functions on each of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydetr.doctor import on_node

Result = TypeVar("Result")

NODE_TIMEOUT_S = 120.0
"""Time limit for a check on a node, including the start of a worker process."""


@dataclass(frozen=True)
class Node:
    """A live node of the cluster."""

    node_id: str
    address: str
    resources: dict[str, float]
    is_driver: bool

    @property
    def name(self) -> str:
        """Address and short id, since nodes can share an address."""
        return f"{self.address} ({self.node_id[:6]})"


def alive() -> list[Node]:
    """List the live nodes, starting with the one of this process."""
    own = ray.get_runtime_context().get_node_id()
    nodes = [
        Node(each["NodeID"], each["NodeManagerAddress"], each["Resources"], each["NodeID"] == own)
        for each in ray.nodes()
        if each["Alive"]
    ]
    return sorted(nodes, key=lambda node: (not node.is_driver, node.address, node.node_id))


def on_each(
    nodes: Sequence[Node], action: Callable[..., Result], *arguments: Any, by_value: bool = False
) -> list[Result | Exception]:
    """Run a function on every node.

    Args:
        nodes: nodes to run it on.
        action: the function. It reserves no CPU, so it also runs on a busy cluster.
        arguments: arguments of the function.
        by_value: ship the code of `on_node` with the task; otherwise each node imports its own copy.

    Returns:
        For each node the result of the function, or the exception.
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
    ray.wait(references, num_returns=len(references), timeout=NODE_TIMEOUT_S)
    return [_outcome(reference) for reference in references]


def _outcome(reference: Any) -> Any:
    try:
        return ray.get(reference, timeout=0.1)
    except ray.exceptions.GetTimeoutError:
        ray.cancel(reference, force=True)
        return TimeoutError(f"no answer within {NODE_TIMEOUT_S:.0f} s")
    except ray.exceptions.RayTaskError as error:
        return error.cause if isinstance(error.cause, Exception) else error
    except ray.exceptions.RayError as error:
        return error
