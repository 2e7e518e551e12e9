"""`--compile`: steps equal eager steps, and a non-finite layer is still found."""

from pathlib import Path

import pytest
import torch

from raydetr.data.shards import Manifest
from raydetr.flat_keys import override
from raydetr.training import non_finite
from raydetr.training.config import TrainConfig
from raydetr.training.state import create_state
from raydetr.training.step import to_arguments
from tests.awkward import write_awkward
from tests.cluster.recorded_training import config as make_config
from tests.training_steps import batches_of_steps, train_here

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_awkward(tmp_path_factory.mktemp("data"), shards=(24,), empty=0.0)


@pytest.fixture
def config(manifest: Manifest, tmp_path: Path) -> TrainConfig:
    plain = make_config(manifest.root, str(tmp_path / "run"))
    return override(plain, workers=1, query_groups=2, dropout=0.0, steps=3)


@pytest.mark.slow
def test_compiled_steps_equal_eager_steps(
    config: TrainConfig, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    plain = create_state(config, manifest, DEVICE)
    expected = train_here(config, manifest, plain)
    compiled_config = override(config, compile=True)
    compiled = create_state(compiled_config, manifest, DEVICE)
    actual = train_here(compiled_config, manifest, compiled)
    assert compiled.model.state_dict().keys() == plain.model.state_dict().keys()
    for one, other in zip(actual, expected, strict=True):
        assert one["loss"] == pytest.approx(
            other["loss"], rel=1e-4 if config.optimizer.precision == "float32" else 1e-9
        )

    copy = compiled.model.optimize()
    with torch.no_grad():
        compiled.model.class_labels_classifier.weight.zero_()
        for parameter in compiled.model.model.parameters():
            parameter.zero_()
    pixels = torch.zeros(1, 3, 64, 64, dtype=copy.dtype, device=DEVICE)
    assert copy(pixels).last_hidden_state.abs().max() > 0, "the copy uses the original's weights"

    batch = next(batches_of_steps(config, manifest))[0]
    compiled = create_state(compiled_config, manifest, DEVICE)
    layer = compiled.model.model.encoder.layers[0]
    layer.fc1.register_forward_hook(lambda module, arguments, output: output * float("nan"))
    assert "encoder.layers.0" in non_finite.find_non_finite(
        compiled.module, to_arguments(batch, compiled), compiled_config
    )
