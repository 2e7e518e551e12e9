"""Run a function in the ranks of a process group, each a real process."""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

# Ranks are forked from one server, which imports these modules once; a new interpreter would need 5 s of CPU for it.
PRELOADED = ["raydetr.training.state", "raydetr.evaluation.in_process"]


def run_ranks(count: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call ``function(rank, *arguments)`` in `count` processes with one thread each.

    Args:
        function: a module-level function.

    Raises:
        torch.multiprocessing.ProcessRaisedException: the first error of a rank, after all ranks have exited.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(_rank, (function, arguments), count, start_method="forkserver")


def _rank(rank: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    function(rank, *arguments)


@contextmanager
def process_group(store: str | Path, rank: int, size: int) -> Iterator[None]:
    """Join a gloo group of `size` ranks, with the file `store` for the rendezvous."""
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=size)
    try:
        yield
        dist.barrier()  # without it, a rank that leaves early causes an error in one that still connects
    finally:
        dist.destroy_process_group()
