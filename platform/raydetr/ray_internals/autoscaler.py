"""Private parts of Ray's autoscaler."""

from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer

default_utilization_scorer = _default_utilization_scorer
"""Ray's default scorer of node types."""
