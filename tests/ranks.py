"""Run a function as the ranks of a process group, on real processes."""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

# Ranks are forks of one server, which imports these once; new interpreters would take 5 s of CPU each for that.
PRELOADED = ["raydetr.training.state", "raydetr.evaluation.in_process"]


def run_ranks(count: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call ``function(rank, *arguments)`` in `count` processes of one thread each.

    Args:
        function: of a module's top level.

    Raises:
        torch.multiprocessing.ProcessRaisedException: the first error of a rank, after all have ended.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(_rank, (function, arguments), count, start_method="forkserver")


def _rank(rank: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    function(rank, *arguments)


@contextmanager
def process_group(store: str | Path, rank: int, size: int) -> Iterator[None]:
    """Belong to a gloo group of `size` ranks that meet at the file `store`."""
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=size)
    try:
        yield
        dist.barrier()  # a rank that leaves while another one still connects would be an error there
    finally:
        dist.destroy_process_group()
