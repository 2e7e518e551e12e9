"""Run the examples of docs/detr.md from the section "Trainer" on, with a small model in place of the hub's."""

import re
from pathlib import Path

import pytest
import torch

from detr import DetrForObjectDetection, DetrImageProcessor
from tests.detr.conftest import randomize_weights, small_config

PAGE = Path(__file__).parents[2] / "docs" / "detr.md"
_, EXAMPLES = PAGE.read_text(encoding="utf-8").split("\n## Trainer\n")
BLOCKS = re.findall(r"^```python\n(.*?)^```", EXAMPLES, re.DOTALL | re.MULTILINE)
TOOLS = ("accelerate", "peft", "transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    model = DetrForObjectDetection(small_config(backbone="resnet18", num_labels=3)).eval()
    randomize_weights(model, seed=0)
    model.save_pretrained(folder)
    DetrImageProcessor(size=64).save_pretrained(folder)
    return str(folder)


class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        labels = {"class_labels": torch.tensor([index % 2]), "boxes": torch.tensor([[0.5, 0.4, 0.3, 0.2]])}
        return {"pixel_values": torch.rand(3, 64, 64), "labels": labels}


def collate(items):
    pixels = torch.stack([item["pixel_values"] for item in items])
    return {"pixel_values": pixels, "labels": [item["labels"] for item in items]}


def test_the_page_has_five_blocks():
    assert len(BLOCKS) == 5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_a_block_of_the_page_runs(index, folder, tmp_path, monkeypatch):
    for tool in TOOLS:
        if f"from {tool} import" in BLOCKS[index]:
            reason = f"the optional dependencies `interop` are not installed: {tool}"
            pytest.importorskip("accelerate" if tool == "transformers" else tool, reason=reason)
    monkeypatch.chdir(tmp_path)
    block = BLOCKS[index].replace("facebook/detr-resnet-50", folder)
    names = {"__name__": "page", "dataset": Items(), "collate": collate}
    exec(compile(block, str(PAGE), "exec"), names)
    assert isinstance(names["model"], torch.nn.Module)
