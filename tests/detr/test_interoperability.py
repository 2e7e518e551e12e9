"""Interoperability: each library loads folders of the other and predicts the same, and other tools' calls work."""

import inspect
import logging

import pytest
import torch
import transformers
from torch import nn

import detr
from detr import (
    DetrConfig,
    DetrForObjectDetection,
    DetrForSegmentation,
    DetrImageProcessor,
    DetrImageProcessorPil,
)
from detr.checkpoint.load_save import _warn_about_backbone
from tests.detr.conftest import randomize_weights, small_config
from tests.tiers import rest_slow

PIXELS = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
MODELS = ["DetrModel", "DetrForObjectDetection", "DetrForSegmentation"]


def save_model(folder, cls=DetrForObjectDetection, **changes):
    heads = {"encoder_attention_heads": 8, "decoder_attention_heads": 8} if cls is DetrForSegmentation else {}
    model = cls(small_config(**{**heads, **changes})).eval()
    randomize_weights(model, seed=1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "changes", [{}, {"auxiliary_loss": True}, {"auxiliary_loss": True, "compat": "transformers"}], ids=str
)
@torch.no_grad()
def test_a_folder_saved_here_predicts_the_same_in_transformers(name, changes, tmp_path):
    ours = save_model(tmp_path, getattr(detr, name), **changes)
    theirs = getattr(transformers, name).from_pretrained(tmp_path).eval()
    reloaded = type(ours).from_pretrained(tmp_path)
    expected = ours(PIXELS)
    torch.testing.assert_close(
        theirs(PIXELS).last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-4
    )
    assert torch.equal(reloaded(PIXELS).last_hidden_state, expected.last_hidden_state)
    assert reloaded.config == ours.config
    assert DetrConfig(**ours.config.to_dict()) == ours.config


@pytest.mark.parametrize("trains_there", [False, True])
@torch.no_grad()
def test_a_folder_saved_by_transformers_after_loading_ours_predicts_as_in_transformers(
    trains_there, tmp_path
):
    """Also if it was trained there with auxiliary losses, although its config.json still has compat="original"."""
    save_model(tmp_path / "ours", auxiliary_loss=True)
    changes = {"auxiliary_loss": True} if trains_there else {}
    theirs = transformers.DetrForObjectDetection.from_pretrained(tmp_path / "ours", **changes).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = DetrForObjectDetection.from_pretrained(tmp_path / "theirs")
    assert loaded.config.compat == ("transformers" if trains_there else "original")
    torch.testing.assert_close(loaded(PIXELS).logits, theirs(PIXELS).logits, rtol=1e-4, atol=1e-4)


def test_saving_a_model_that_transformers_predicts_differently_warns_once(tmp_path, caplog):
    _warn_about_backbone.cache_clear()
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        save_model(tmp_path, backbone="mobilenetv3_small_050")
    assert caplog.text.count("transformers can load it but predicts differently") == 1
    _warn_about_backbone.cache_clear()
    caplog.clear()
    save_model(tmp_path, backbone="mobilenetv3_small_050", compat="transformers")
    save_model(tmp_path)
    assert "predicts differently" not in caplog.text


@pytest.mark.parametrize("name", MODELS)
def test_positional_arguments_are_those_of_transformers(name):
    def names(library):
        signature = inspect.signature(getattr(library, name).forward)
        return [p.name for p in signature.parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]

    theirs = names(transformers)
    if name == "DetrModel":  # ours has no labels: those of transformers are ignored there
        theirs = [each for each in theirs if each != "labels"]
    assert names(detr)[: len(theirs)] == theirs


@pytest.mark.parametrize(
    "arguments",
    [
        {"is_main_process": True, "save_function": torch.save},
        {"safe_serialization": True},
        {"state_dict": "own"},
        {"max_shard_size": "20KB"},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_save_pretrained_accepts_the_arguments_of_accelerate(arguments, tmp_path):
    model = DetrForObjectDetection(small_config()).eval()
    if "state_dict" in arguments:
        arguments = {"state_dict": {name: 2 * tensor for name, tensor in model.state_dict().items()}}
    model.save_pretrained(tmp_path, **arguments)
    loaded = DetrForObjectDetection.from_pretrained(tmp_path, low_cpu_mem_usage=True)
    factor = 2 if "state_dict" in arguments else 1
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, factor * model.state_dict()[name])


def test_only_the_main_process_writes_and_unsupported_arguments_are_rejected(tmp_path):
    model = DetrForObjectDetection(small_config())
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="safetensors only"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    state = dict(model.state_dict())
    state.pop("bbox_predictor.layers.0.bias")
    with pytest.raises(
        ValueError, match=r"state_dict is not that of the model: bbox_predictor\.layers\.0\.bias"
    ):
        model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="every_n_layers=2"):
        model.activation_checkpointing_enable(every_n_layers=2)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_with_either_implementation_gives_the_same_gradients(use_reentrant, make_batch):
    model, batch = DetrForObjectDetection(small_config(auxiliary_loss=True)).train(), make_batch()

    def gradients():
        model.zero_grad()
        model(batch.pixel_values, batch.pixel_mask, labels=batch.labels).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert model.is_gradient_checkpointing
    for got, exact in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_use_fast_must_match_the_processor_class(tmp_path):
    DetrImageProcessor(size=64).save_pretrained(tmp_path)
    assert type(DetrImageProcessor.from_pretrained(tmp_path, use_fast=True)) is DetrImageProcessor
    assert type(DetrImageProcessorPil.from_pretrained(tmp_path, use_fast=False)) is DetrImageProcessorPil
    for cls, use_fast in ((DetrImageProcessor, False), (DetrImageProcessorPil, True)):
        with pytest.raises(ValueError, match=", or AutoImageProcessor"):
            cls.from_pretrained(tmp_path, use_fast=use_fast)


def test_the_error_for_a_trainer_folder_without_config_says_what_to_do(tmp_path):
    from safetensors.torch import save_file

    model = DetrForObjectDetection(small_config()).eval()
    save_file(model.state_dict(), str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(FileNotFoundError, match=r"give config=model\.config to from_pretrained"):
        DetrForObjectDetection.from_pretrained(tmp_path)
    loaded = DetrForObjectDetection.from_pretrained(tmp_path, config=model.config)
    torch.testing.assert_close(loaded(PIXELS).logits, model(PIXELS).logits)


@pytest.mark.parametrize("backbone", rest_slow(["regnety_002", "nextvit_small", "ghostnet_050"]))
def test_a_saved_model_loads_unchanged_for_any_backbone(backbone, tmp_path):
    """One of the backbones has BatchNorm1d, whose num_batches_tracked is saved."""
    model = DetrForObjectDetection(small_config(backbone=backbone)).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and "running_var" not in name:
                tensor.add_(torch.rand_like(tensor) * 0.01)
            elif name.endswith("num_batches_tracked"):
                tensor.fill_(7)
    model.save_pretrained(tmp_path)
    loaded = DetrForObjectDetection.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_model_can_be_created_with_parameters_on_the_meta_device(monkeypatch):
    """As accelerate's init_empty_weights does: parameters move to meta when they are registered, buffers do not."""
    register = nn.Module.register_parameter

    def on_meta(module, name, parameter):
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    plain = DetrForSegmentation(small_config(encoder_attention_heads=8, decoder_attention_heads=8)).eval()
    monkeypatch.setattr(nn.Module, "register_parameter", on_meta)
    empty = DetrForSegmentation(plain.config).eval()
    monkeypatch.undo()
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.load_state_dict(plain.state_dict(), assign=True)
    assert torch.equal(empty(PIXELS).pred_masks, plain(PIXELS).pred_masks)


def test_an_output_is_a_dict_of_the_fields_that_are_not_none():
    output = detr.model.outputs.DetrObjectDetectionOutput(logits=torch.ones(1), pred_boxes=torch.zeros(1))
    assert isinstance(output, dict)
    assert type(output)(dict(output.items())).keys() == output.keys()  # accelerate rebuilds outputs this way
    output.loss = torch.tensor(2.0)
    assert [*output] == ["loss", "logits", "pred_boxes"]
    assert output[0] is output.loss is output["loss"]
    output["loss"] = None
    assert [*output] == ["logits", "pred_boxes"]
    assert output[:1] == (output.logits,)
    with pytest.raises(TypeError, match="fixed fields"):
        output.pop("logits")
    with pytest.raises(KeyError, match="has no field 'boxes'"):
        output["boxes"] = torch.ones(1)
