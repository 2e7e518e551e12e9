"""What a pipeline prints and writes of its summary."""

import dataclasses
import json
from pathlib import Path

import pytest

from raydetr.command import print_config, print_summary, write_summary


def test_a_summary_is_json_whatever_its_numbers_are(tmp_path: Path) -> None:
    file = tmp_path / "new" / "summary.json"
    write_summary(str(file), {"a": float("nan"), "b": {"c": [1.5, float("inf")]}, "d": "nan"})
    text = file.read_text()
    assert "NaN" not in text
    assert json.loads(text) == {"schema_version": 1, "a": None, "b": {"c": [1.5, None]}, "d": "nan"}
    assert [each.name for each in file.parent.iterdir()] == ["summary.json"]


def test_numbers_are_printed_as_one_reads_them(capsys: pytest.CaptureFixture[str]) -> None:
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


def test_only_settings_that_were_given_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    print_config(Flags("my data", steps=7))
    assert capsys.readouterr().out.splitlines() == [
        "Flags",
        "  train-data = 'my data'",
        "  steps = 7",
        "  1 settings have their defaults, which --help lists",
    ]
    print_config(Flags("my data", steps=7), default=Flags("my data", steps=7, sizes=(3,)))
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  sizes = (1, 2)",
        "  2 settings have their defaults, which --help lists",
    ]
