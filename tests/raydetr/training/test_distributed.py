"""The sums and the mean gradients of a step, computed by real process groups of one to four processes."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from raydetr.data.micro_batch import TrainingBatch
from raydetr.training.distributed import StepTotals, step_totals
from raydetr.training.state import parallelise

QUERIES, EOS = 5, 0.1


def batch(counts: Sequence[int | None]) -> TrainingBatch:
    """A batch with that many boxes per slot; None is an empty slot."""
    return TrainingBatch(
        step=0,
        position=0,
        epoch=0,
        shape=(4, 4),
        images=tuple(None if count is None else torch.zeros(3, 4, 4, dtype=torch.uint8) for count in counts),
        weights=torch.tensor([float(count is not None) for count in counts]),
        labels=[
            {
                "image_id": torch.tensor([0]),
                "class_labels": torch.zeros(n or 0, dtype=torch.int64),
                "boxes": torch.full((n or 0, 4), 0.5),
            }
            for n in counts
        ],
        image_ids=(),
        skipped=("1: cut short",) if None in counts else (),
    )


def work(rank: int, share: list[list[list[int | None]]], file: str, results: str) -> None:
    dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=len(share))
    torch.save(step_totals([batch(counts) for counts in share[rank]], QUERIES, EOS), f"{results}/{rank}")
    dist.destroy_process_group()


def in_processes(share: list[list[list[int | None]]], folder: Path) -> list[StepTotals]:
    mp.spawn(work, (share, str(folder / "store"), str(folder)), nprocs=len(share))
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(len(share))]


CASES = {
    "boxes everywhere": [[[3, 2], [1, 0]], [[4, 4], [2, 2]]],
    "one rank without boxes": [[[3, 2]], [[0, 0]], [[None, None]]],
    "no boxes at all": [[[0, 0]], [[0, None]]],
    "fewer boxes than workers": [[[1]], [[0]], [[0]], [[1]]],
    "more boxes than queries": [[[9]], [[7]]],
    "no image at all": [[[None]], [[None]]],
    "one process": [[[2, 3], [1, None]]],
}


@pytest.mark.parametrize("name", CASES)
def test_every_worker_has_the_average_of_the_global_sums(name: str, tmp_path: Path) -> None:
    share = CASES[name]
    counts = [n for rank in share for one in rank for n in one if n is not None]
    weight = sum(min(n, QUERIES) + EOS * (QUERIES - min(n, QUERIES)) for n in counts)
    for totals in in_processes(share, tmp_path):
        assert totals.num_boxes == pytest.approx(max(sum(counts), 1) / len(share), rel=1e-12)
        assert totals.class_weight_sum == pytest.approx((weight or 1.0) / len(share), rel=1e-12)
        assert totals.images == len(counts)


def train(rank: int, file: str, results: str) -> None:
    """The gradients of the same loss in three steps of one process, and those that the worker has alone."""
    dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=3)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 50), torch.nn.Tanh(), torch.nn.Linear(50, 11)).double()
    pixels = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    alone = torch.autograd.grad(model(pixels).square().sum(), list(model.parameters()))
    parallel, steps = parallelise(model), []
    for _ in range(3):
        parallel(pixels).square().sum().backward()
        steps.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    torch.save((alone, steps), f"{results}/{rank}")
    dist.destroy_process_group()


def test_three_workers_have_the_same_mean_gradient_in_their_first_step_as_later(tmp_path: Path) -> None:
    mp.spawn(train, (str(tmp_path / "store"), str(tmp_path)), nprocs=3)
    alone, steps = zip(*(torch.load(tmp_path / str(rank)) for rank in range(3)), strict=True)
    expected = [(one + two + three) / 3 for one, two, three in zip(*alone, strict=True)]
    for gradients in (each for of_rank in steps for each in of_rank):
        for got, mean in zip(gradients, expected, strict=True):
            assert torch.equal(got, mean)
