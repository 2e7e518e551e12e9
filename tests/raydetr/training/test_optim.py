"""Learning rates, parameter groups and the moving average."""

import pytest
import torch

from raydetr.data.shards import Manifest
from raydetr.training.optim import MovingAverage, build_optimizer, schedule, set_learning_rates
from raydetr.training.recipes import RECIPES
from raydetr.training.state import create_state
from tests.awkward import write_awkward
from tests.cluster.recorded_training import config as make_config
from tests.training_config import small_config


def test_the_cosine_schedule_warms_up_and_falls_to_zero() -> None:
    config = small_config(steps=100, warmup_steps=10, schedule="cosine")
    shares = [schedule(step, config.optimizer) for step in range(101)]
    assert shares[0] == pytest.approx(1 / 11)
    assert shares[:10] == sorted(shares[:10])
    assert shares[11:] == sorted(shares[11:], reverse=True)
    assert shares[100] == pytest.approx(0)


def test_the_step_schedule_drops_to_a_tenth_once() -> None:
    config = small_config(steps=100, warmup_steps=0, schedule="step", lr_drop_at=0.7)
    assert [schedule(step, config.optimizer) for step in (0, 69, 70, 99)] == [1, 1, 0.1, 0.1]


def test_the_recipe_of_the_paper_has_its_values() -> None:
    config = RECIPES["detr-r50"]()
    assert (config.optimizer.learning_rate, config.optimizer.backbone_learning_rate) == (1e-4, 1e-5)
    assert (
        config.optimizer.weight_decay,
        config.optimizer.max_grad_norm,
        config.model.architecture.num_queries,
    ) == (1e-4, 0.1, 100)
    assert (
        config.data.augmentation.shortest_edges[0],
        config.data.augmentation.shortest_edges[-1],
        config.data.augmentation.longest_edge,
    ) == (480, 800, 1333)


def test_the_backbone_has_its_own_learning_rate_and_every_trainable_parameter_is_in_one_group(
    tmp_path: pytest.TempPathFactory,
) -> None:
    manifest: Manifest = write_awkward(tmp_path, shards=(8,))
    config = make_config(manifest.root, str(tmp_path))
    model = create_state(config, manifest, torch.device("cpu")).model
    optimizer = build_optimizer(model, config.optimizer)
    set_learning_rates(optimizer, 10**9, config.optimizer)
    rest, backbone = optimizer.param_groups
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(rest["params"]) + len(backbone["params"]) == len(trained)
    assert {id(p) for p in backbone["params"]} == {id(p) for n, p in trained.items() if "backbone" in n}
    assert rest["lr"] / backbone["lr"] == pytest.approx(
        config.optimizer.learning_rate / config.optimizer.backbone_learning_rate
    )


def test_the_average_follows_the_weights_and_swaps_both_ways() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    average = MovingAverage(model, decay=0.5)
    with torch.no_grad():
        model.weight.fill_(4.0)
        average.values[0].fill_(0.0)
    average.update(step=1000)
    assert average.values[0].tolist() == [[2.0, 2.0]]
    average.swap()
    assert model.weight.tolist() == [[2.0, 2.0]]
    average.swap()
    assert model.weight.tolist() == [[4.0, 4.0]]
