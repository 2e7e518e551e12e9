"""Every Python block of the DETR page of transformers runs with `detr` in place of transformers.

Other substitutions: model ids become folders written by transformers (the real architecture, random weights), and the
host of the image becomes a local server. Without a GPU, a block with `device_map=0` runs twice: unchanged, to raise the
documented error, and with "cpu".
"""

import codeop
import re
from pathlib import Path

import pytest
import torch
import transformers

import detr
from tests.http_folder import serve
from tests.tiers import rest_slow

SHARED = Path(__file__).parents[3] / "shared"
PAGE = SHARED / "spec/detr.md"
IMAGE = SHARED / "data/coco_cats/000000039769.png"
NUMBER_OF_BLOCKS = 9
HOST = "http://images.cocodataset.org/val2017"

pytestmark = pytest.mark.skipif(
    not (PAGE.is_file() and IMAGE.is_file()), reason="no specification: ../shared/spec does not exist"
)


def blocks():
    """Return the Python blocks of the page, with prompts and expected outputs."""
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def program(block):
    """Return the statements of a block, each with the output that the page shows after it, or ""."""
    if ">>>" not in block:
        return [(block, "")]
    statements, lines, shown = [], [], []
    for line in [*block.splitlines(), ">>> "]:
        if line.startswith(">>>"):
            if lines:
                statements.append(("\n".join(lines) + "\n", "\n".join(shown).strip()))
            lines, shown = [line[4:]], []
        elif line.startswith("..."):
            lines.append(line[4:])
        else:
            shown.append(line)
    return statements


def run(block, names, capsys):
    """Execute the statements of a block; return the output that the page shows and the real output of each."""
    results = []
    for source, shown in program(block):
        capsys.readouterr()
        if shown:
            exec(codeop.compile_command(source, "<page>", "single"), names)
        else:
            exec(compile(source, "<page>", "exec"), names)
        results.append((shown, capsys.readouterr().out.strip()))
    return results


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Map the model ids of the page to folders written by transformers."""
    saved = {}
    for name, cls, labels in (
        ("facebook/detr-resnet-50-panoptic", transformers.DetrForSegmentation, 250),
        ("facebook/detr-resnet-50", transformers.DetrForObjectDetection, 91),
    ):
        folder = tmp_path_factory.mktemp("page") / name.split("/")[1]
        torch.manual_seed(0)
        cls(transformers.DetrConfig(num_labels=labels)).save_pretrained(folder)
        transformers.DetrImageProcessor().save_pretrained(folder)
        saved[name] = str(folder)
    return saved


@pytest.fixture
def adapt(folders, tmp_path):
    """Return a function that applies the substitutions to a block; a local server provides the image."""
    (tmp_path / "000000039769.jpg").write_bytes(IMAGE.read_bytes())

    with serve(tmp_path) as url:

        def change(block, models=folders):
            block = re.sub(r"\bfrom transformers(\.\w+)* import", r"from detr\1 import", block)
            for name, folder in models.items():  # the longer id first
                block = block.replace(f'"{name}"', f'"{folder}"')
            return block.replace(HOST, url)

        yield change


def test_the_page_has_nine_blocks_all_of_which_are_tested():
    assert len(blocks()) == NUMBER_OF_BLOCKS
    continued = [index for index, block in enumerate(blocks()) if "import" not in block]
    assert continued == [4]


@pytest.mark.parametrize("index", rest_slow(range(NUMBER_OF_BLOCKS), fast=2))
def test_a_block_of_the_page_runs(index, adapt, capsys):
    block = adapt(blocks()[index])
    assert "transformers" not in re.sub(r"#.*", "", block)
    names = {"__name__": "page"}
    if index == 4:  # continues the previous block
        run(adapt(blocks()[3]), names, capsys)
        del names["config"], names["model"]
    if "device_map=0" in block and not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="device_map=0: this machine has 0 CUDA devices"):
            run(block, dict(names), capsys)
        block = block.replace("device_map=0", 'device_map="cpu"')
    before = set(names)
    results = run(block, names, capsys)
    assert set(names) - before, "the block defined no names: it was not executed"
    for shown, printed in results:
        if shown.startswith(("[1, 100, 256]", "torch.Size")):  # does not depend on trained weights
            assert printed == shown
    if "model" in names:
        assert type(names["model"]).__module__.startswith("detr.")
    assert index or isinstance(names["pipeline"], detr.hf.image_pipelines.ImagePipeline)


def test_a_trained_checkpoint_gives_the_numbers_of_the_page(checkpoint, adapt, capsys):
    block = adapt(blocks()[7], {"facebook/detr-resnet-50": str(checkpoint)})
    results = run(block, {"__name__": "page"}, capsys)
    (shown, printed) = next((shown, printed) for shown, printed in results if "Detected remote" in shown)
    number = re.compile(r"-?\d+\.\d+")
    assert number.sub("#", printed) == number.sub("#", shown)
    got, expected = ([float(x) for x in number.findall(text)] for text in (printed, shown))
    assert got == pytest.approx(expected, abs=0.5)
    assert [got[i] for i in range(0, len(got), 5)] == pytest.approx(expected[::5], abs=0.002)
