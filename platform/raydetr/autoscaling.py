"""Which node type Ray's autoscaler starts: spot first, another while spot is refused.

`cluster.yaml` names `spot_first` in RAY_AUTOSCALER_UTILIZATION_SCORER, where Ray's autoscaler on the head looks it up.
By itself, that of Ray 2.60 asks for the same node type again after EC2 had none to give: the scorer that it comes with
is told what was refused and does not look at it. (The second version, RAY_enable_autoscaler_v2, only takes notice of
nodes that were given and never came up.)
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
    """How well a node of this type fits what is asked for; the type with the largest score is started.

    Args:
        node_resources: what such a node has.
        resources: what is asked for, each on one node.
        node_type: its name; one that ends in `on_demand` is the second choice among equals.
        node_availability_summary: which types could not be started, of the last half hour.

    Returns:
        Ray's score, among equals of whose kinds of resources those come first that were not refused, of them spot;
        None where nothing fits.
    """
    score = default_utilization_scorer(
        node_resources, resources, node_type, node_availability_summary=node_availability_summary
    )
    if score is None:
        return None
    wastes_no_gpu, matching, *utilisation = score
    record = node_availability_summary.node_availabilities.get(node_type)
    refused = record is not None and not record.is_available
    return (wastes_no_gpu, matching, not refused, not node_type.endswith(_ON_DEMAND), *utilisation)
