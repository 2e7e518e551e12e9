"""Private parts of Ray Serve."""

from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

__all__ = ["SERVE_CONTROLLER_NAME", "SERVE_NAMESPACE"]
