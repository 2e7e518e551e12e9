"""Node type choice for Ray's autoscaler: spot first, on demand while EC2 has no spot capacity.

`cluster.yaml` names `spot_first` in RAY_AUTOSCALER_UTILIZATION_SCORER, which Ray's autoscaler reads on the head.
The default scorer of Ray 2.60 receives the recent launch failures and ignores them, so it requests a node type again
right after EC2 refused it. (RAY_enable_autoscaler_v2 only considers nodes that were granted and never came up.)
"""

from typing import Any

from raydetr.ray_internals.autoscaler import default_utilization_scorer

_ON_DEMAND = "on_demand"


def spot_first(
    node_resources: dict[str, Any],
    resources: list[dict[str, Any]],
    node_type: str,
    *,
    node_availability_summary: Any,
) -> tuple[Any, ...] | None:
    """Score how well a node type fits the requested resources; Ray starts the type with the largest score.

    Args:
        node_resources: resources of one node of this type.
        resources: requested bundles; each must fit on one node.
        node_type: name of the type; names that end in `on_demand` lose ties against others.
        node_availability_summary: launch failures of the last half hour, by node type.

    Returns:
        Ray's default score with two tie-breakers after its first two entries (unused GPUs, matching kinds of
        resources): not refused by EC2, then not on demand. None where no bundle fits.
    """
    score = default_utilization_scorer(
        node_resources, resources, node_type, node_availability_summary=node_availability_summary
    )
    if score is None:
        return None
    wastes_no_gpu, matching, *utilization = score
    record = node_availability_summary.node_availabilities.get(node_type)
    refused = record is not None and not record.is_available
    # Tuples compare entry by entry, so the tie-breakers must precede the utilization.
    return (wastes_no_gpu, matching, not refused, not node_type.endswith(_ON_DEMAND), *utilization)
