"""The dispatcher through which Ray forwards log lines of workers to a driver."""

from ray._private.ray_logging import global_worker_stdstream_dispatcher

__all__ = ["global_worker_stdstream_dispatcher"]
