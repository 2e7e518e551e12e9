"""Parts of Ray's autoscaler that have no public name."""

from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer

default_utilization_scorer = _default_utilization_scorer
"""Ray's own choice of a node type."""
