"""Normalizers and mean gradients of a step, computed by real process groups of one to four processes."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from raydetr.data.stream.micro_batch import TrainingBatch
from raydetr.training.distributed import StepTotals, step_totals
from raydetr.training.state import parallelize
from tests.ranks import process_group, run_ranks

QUERIES, EOS = 5, 0.1
Gradients = tuple[torch.Tensor, ...]


def batch(counts: Sequence[int | None]) -> TrainingBatch:
    """Build a batch with this many boxes per slot; None is an empty slot."""
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


CASES = {
    "boxes everywhere": [[[3, 2], [1, 0]], [[4, 4], [2, 2]]],
    "one rank without boxes": [[[3, 2]], [[0, 0]], [[None, None]]],
    "no boxes at all": [[[0, 0]], [[0, None]]],
    "fewer boxes than workers": [[[1]], [[0]], [[0]], [[1]]],
    "more boxes than queries": [[[9]], [[7]]],
    "no image at all": [[[None]], [[None]]],
    "one process": [[[2, 3], [1, None]]],
}


def work(rank: int, folder: str) -> None:
    """Run all cases one after another, each in a separate process group of the first processes."""
    for number, share in enumerate(CASES.values()):
        if rank < len(share):
            with process_group(f"{folder}/store-{number}", rank, len(share)):
                totals = step_totals([batch(counts) for counts in share[rank]], QUERIES, EOS)
            torch.save(totals, f"{folder}/{number}-{rank}")
    if rank < 3:
        with process_group(f"{folder}/store", rank, 3):
            torch.save(train(rank), f"{folder}/gradients-{rank}")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the result of each process in each case."""
    folder = tmp_path_factory.mktemp("results")
    run_ranks(4, work, str(folder))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_every_worker_has_the_average_of_the_global_sums(name: str, results: Path) -> None:
    share, number = CASES[name], list(CASES).index(name)
    counts = [n for rank in share for one in rank for n in one if n is not None]
    weight = sum(min(n, QUERIES) + EOS * (QUERIES - min(n, QUERIES)) for n in counts)
    for rank in range(len(share)):
        totals: StepTotals = torch.load(results / f"{number}-{rank}", weights_only=False)
        assert totals.num_boxes == pytest.approx(max(sum(counts), 1) / len(share), rel=1e-12)
        assert totals.class_weight_sum == pytest.approx((weight or 1.0) / len(share), rel=1e-12)
        assert totals.images == len(counts)


def train(rank: int) -> tuple[Gradients, list[Gradients]]:
    """Return this worker's own gradients, and the mean gradients of the same loss in three steps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 50), torch.nn.Tanh(), torch.nn.Linear(50, 11)).double()
    pixels = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    alone = torch.autograd.grad(model(pixels).square().sum(), list(model.parameters()))
    parallel, steps = parallelize(model), []
    for _ in range(3):
        parallel(pixels).square().sum().backward()
        steps.append(tuple(p.grad.clone() for p in model.parameters()))
        model.zero_grad()
    return alone, steps


def test_three_workers_compute_the_same_mean_gradient_in_the_first_and_later_steps(results: Path) -> None:
    alone, steps = zip(*(torch.load(results / f"gradients-{rank}") for rank in range(3)), strict=True)
    expected = [(one + two + three) / 3 for one, two, three in zip(*alone, strict=True)]
    for gradients in (each for of_rank in steps for each in of_rank):
        for gradient, mean in zip(gradients, expected, strict=True):
            assert torch.equal(gradient, mean)
