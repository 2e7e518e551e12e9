"""Flags of training: recipes, configuration files, and their order of precedence."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from raydetr.errors import ConfigError
from raydetr.flat_keys import flatten, nest, override
from raydetr.training.config import TrainConfig
from raydetr.training.recipes import RECIPES, detr_r50, load_recipe, multi_scale
from raydetr.training.start import DefaultsConfig, read_defaults, run


def parsed(*args: str) -> TrainConfig:
    """Return the settings that a job gets."""
    received: list[TrainConfig] = []

    def main(config: TrainConfig) -> dict[str, Any]:
        received.append(config)
        return {}

    run(main, TrainConfig, args)
    return received[0]


def names(config: Any) -> list[str]:
    """List the names of all settings, with those that occur twice."""
    listed: list[str] = []
    for name, value in vars(config).items():
        listed += names(value) if hasattr(value, "__dataclass_fields__") else [name]
    return listed


def test_setting_names_are_distinct() -> None:
    assert len(names(TrainConfig())) == len(set(names(TrainConfig()))) == len(flatten(TrainConfig()))


def test_flags_replace_the_file_and_the_file_replaces_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "optimizer:\n  steps: 70\n  warmup_steps: 7\nmodel: {architecture: {num_queries: 33}}\nseed: 5\n"
    )
    config = parsed("--recipe", "detr-small", "--config", str(file), "--steps", "9", "--no-group-sizes")
    expected = override(
        RECIPES["detr-small"](), steps=9, warmup_steps=7, num_queries=33, seed=5, group_sizes=False
    )
    assert config == expected


def test_the_printed_configuration_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in RECIPES:
        run(
            lambda _: pytest.fail("it printed only"),
            TrainConfig,
            ["--recipe", name, "--print-config", "--seed", "3"],
        )
        printed = capsys.readouterr().out
        assert list(yaml.safe_load(printed)) == list(nest(TrainConfig()))
        file = tmp_path / f"{name}.yaml"
        file.write_text(printed)
        # Another recipe: the file has all settings.
        defaults = DefaultsConfig(recipe="detr-r50" if name != "detr-r50" else "scenes", config=str(file))
        assert read_defaults(defaults) == override(RECIPES[name](), seed=3)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("optimizer: {step: 3}", "there is no setting step. Did you mean steps?"),
        ("steps: many", "steps is 'many': Input should be a valid integer"),
        ("steps: 0", "--steps is 0"),
        ("task: boxes", "task is 'boxes'"),
        ("flip: 7", "flip is 7.0: expected a probability"),
        ("- steps", "expected settings"),
        ("steps: [", "this is not YAML"),
    ],
)
def test_errors_in_a_file_name_the_setting(content: str, error: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_defaults(DefaultsConfig(config=str(file)))
    assert error in str(caught.value)


def test_the_settings_of_a_run_can_be_read(tmp_path: Path) -> None:
    config = override(multi_scale(), steps=7, workers=1, crop_sizes=(10, 20))
    stored = json.loads(
        json.dumps({"identity": config.identity() | {"data_digest": "x"}, "config": flatten(config)})
    )
    file = tmp_path / "run.json"
    file.write_text(json.dumps(stored))
    assert read_defaults(DefaultsConfig(recipe="detr-r50", config=str(file))) == config
    # A run of version 0.1: only its identity, with names that changed.
    old = {key: value for key, value in stored["identity"].items() if key != "max_grad_norm"} | {
        "clip_norm": 0.7
    }
    file.write_text(json.dumps({"identity": old}))
    read = read_defaults(DefaultsConfig(recipe="detr-r50", config=str(file)))
    assert read.identity() == override(config, max_grad_norm=0.7).identity()


def test_a_recipe_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_recipes.py").write_text(
        "from raydetr.flat_keys import override\n"
        "from raydetr.training.recipes import detr_r50\n"
        "def long():\n    return override(detr_r50(), steps=1_000_000)\n"
        "def wrong():\n    return {}\n"
    )
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each not in ("", str(tmp_path))])
    assert load_recipe("my_recipes:long") == override(detr_r50(), steps=1_000_000)
    assert "" not in sys.path
    for name, error in {
        "my_recipes:wrong": "it returned dict",
        "my_recipes:missing": "missing",
        "no_such_module:long": "no_such_module",
        "detr-r51": "give one of multi-scale",
    }.items():
        with pytest.raises(ConfigError, match=f"(?i)--recipe {name}: .*{error}"):
            load_recipe(name)


def test_an_architecture_flag_with_a_model_exits_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parsed("--recipe", "fine-tune", "--model", "hub:a/b", "--num-queries", "5")
    assert "--num-queries: the architecture is that of --model hub:a/b" in capsys.readouterr().err


def test_only_what_a_run_computes_is_its_identity() -> None:
    identity = TrainConfig().identity()
    assert {
        "steps",
        "train_data",
        "flip",
        "d_model",
        "val_data",
        "output",
        "learning_rate",
    } <= identity.keys()
    assert not {"workers", "json", "checkpoint_every", "max_hours", "tracking_uri"} & identity.keys()
