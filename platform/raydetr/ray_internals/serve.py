"""Parts of Ray Serve that have no public name."""

from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

__all__ = ["SERVE_CONTROLLER_NAME", "SERVE_NAMESPACE"]
