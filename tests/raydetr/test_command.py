"""Output of a pipeline: the configuration and the summary, printed and as JSON."""

import dataclasses
import json
from pathlib import Path

import pytest

from raydetr.command import print_config, print_summary, run, write_summary
from raydetr.config import DemoConfig


def test_a_summary_is_valid_json_with_non_finite_numbers(tmp_path: Path) -> None:
    file = tmp_path / "new" / "summary.json"
    write_summary(str(file), {"a": float("nan"), "b": {"c": [1.5, float("inf")]}, "d": "nan"})
    text = file.read_text()
    assert "NaN" not in text
    assert json.loads(text) == {"schema_version": 1, "a": None, "b": {"c": [1.5, None]}, "d": "nan"}
    assert [each.name for each in file.parent.iterdir()] == ["summary.json"]


@pytest.mark.parametrize("place", ["a folder", "a file/summary.json"])
def test_an_unwritable_summary_file_is_refused_before_the_work(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a folder").mkdir()
    (tmp_path / "a file").touch()
    calls: list[DemoConfig] = []
    flags = ["--json", str(tmp_path / place)]
    with pytest.raises(SystemExit) as stop:
        run(lambda config: calls.append(config) or {}, DemoConfig, args=flags)
    assert stop.value.code == 2
    assert f"error: --json {tmp_path / place}: " in capsys.readouterr().err
    assert calls == []
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a file", "a folder"]


def test_numbers_are_printed_with_few_digits(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary({"seconds": 10800.25, "AP": 0.123456, "rate": 345.678, "steps": 1400, "list": [1]})
    assert [line.split() for line in capsys.readouterr().out.splitlines() if line] == [
        ["seconds", "10800"],
        ["AP", "0.1235"],
        ["rate", "345.7"],
        ["steps", "1400"],
    ]


@dataclasses.dataclass
class Flags:
    train_data: str
    steps: int = 100
    sizes: tuple[int, ...] = (1, 2)


def test_only_settings_that_differ_from_their_defaults_are_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_config(Flags("my data", steps=7))
    assert capsys.readouterr().out.splitlines() == [
        "Flags",
        "  train-data = 'my data'",
        "  steps = 7",
        "  1 settings at their defaults (listed by --help)",
    ]
    print_config(Flags("my data", steps=7), default=Flags("my data", steps=7, sizes=(3,)))
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  sizes = (1, 2)",
        "  2 settings at their defaults (listed by --help)",
    ]
