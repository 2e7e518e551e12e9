import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from detr.config import DetrConfig
from detr.model.detection import DetrForObjectDetection, DetrModel
from detr.model.outputs import DetrEncoderOutput, DetrObjectDetectionOutput
from tests.tiers import rest_slow

CASES = {
    "resnet18": {"backbone": "resnet18"},
    "resnet50": {"backbone": "resnet50", "encoder_layers": 1},
    "resnet50-dc5": {"backbone": "resnet50", "dilation": True, "encoder_layers": 1},
    "learned positions": {"position_embedding_type": "learned"},
    "gelu, other heads": {"activation_function": "gelu", "decoder_attention_heads": 2},
    "auxiliary, as transformers": {"auxiliary_loss": True, "compat": "transformers"},
    "mobilenet, as transformers": {
        "backbone": "tf_mobilenetv3_small_075",
        "compat": "transformers",
        "backbone_gain": 0.8,
    },
    "one channel": {"num_channels": 1},
    "one map, stride 16": {"backbone_kwargs": {"out_indices": [3]}},
}


def largest_difference(ours, theirs) -> float:
    return float((ours.double() - theirs.double()).abs().max())


@pytest.mark.checklist("2. Backbone", "DC5")
@pytest.mark.checklist("2. Backbone", "num_channels")
@pytest.mark.checklist("3. Position embeddings and transformer", "input projection")
@pytest.mark.checklist("3. Position embeddings and transformer", "encoder layer")
@pytest.mark.checklist("3. Position embeddings and transformer", "decoder")
@pytest.mark.checklist("4. Heads, segmentation head", "class head")
@pytest.mark.checklist("4. Heads, segmentation head", "box head")
@pytest.mark.parametrize("case", rest_slow(CASES, fast=3))
def test_predictions_equal_transformers_in_float64_and_have_its_accuracy_in_float32(
    case, make_twins, make_batch, difference
):
    values = dict(CASES[case])
    kwargs = values.pop("backbone_kwargs", None)
    if kwargs:
        values["backbone_config"] = {"model_type": "timm_backbone", "backbone": "resnet18", **kwargs}
    twins = make_twins(**values)
    exact = twins.to(torch.float64)
    channels = values.get("num_channels", 3)
    padded, alone = make_batch(), make_batch(sizes=((64, 96),), seed=1)
    with torch.no_grad():
        for batch, mask in ((padded, padded.pixel_mask), (alone, None)):
            pixels = batch.pixel_values[:, :channels]
            ours = exact.ours(pixels.double(), mask)
            theirs = exact.theirs(pixels.double(), pixel_mask=mask)
            rounded = twins.ours(pixels, mask)
            their_rounded = twins.theirs(pixels, pixel_mask=mask)
            for name in ("logits", "pred_boxes", "last_hidden_state", "encoder_last_hidden_state"):
                assert theirs[name].std(1).mean() > 1e-3, f"{name}: the weights don't separate the queries"
                difference(largest_difference(ours[name], theirs[name]))
                assert largest_difference(ours[name], theirs[name]) < 1e-8, name
                error = largest_difference(their_rounded[name], theirs[name])
                assert largest_difference(rounded[name], theirs[name]) < 3 * error + 1e-7, name


@pytest.mark.checklist("3. Position embeddings and transformer", "hidden states")
@pytest.mark.checklist("3. Position embeddings and transformer", "attentions")
@pytest.mark.checklist("3. Position embeddings and transformer", "outputs")
@pytest.mark.checklist("3. Position embeddings and transformer", "intermediate_hidden_states")
@pytest.mark.parametrize("auxiliary", [False, True])
def test_all_outputs_equal_transformers_by_name_shape_and_value(
    auxiliary, make_twins, make_batch, difference
):
    twins = make_twins(auxiliary_loss=auxiliary, compat="transformers").to(torch.float64)
    twins.theirs.set_attn_implementation("eager")
    batch = make_batch(dtype=torch.float64)
    flags = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        for ours, theirs in ((twins.ours, twins.theirs), (twins.ours.model, twins.theirs.model)):
            a = ours(batch.pixel_values, batch.pixel_mask, **flags)
            b = theirs(batch.pixel_values, pixel_mask=batch.pixel_mask, **flags)
            assert list(a.keys()) == list(b.keys())
            for name in a:
                x, y = a[name], b[name]
                x, y = (x, y) if isinstance(x, tuple) else ((x,), (y,))
                assert [t.shape for t in x] == [t.shape for t in y], name
                for ours_t, theirs_t in zip(x, y, strict=True):
                    assert largest_difference(ours_t, theirs_t) < 1e-8, name


@pytest.mark.checklist("3. Position embeddings and transformer", "attentions")
@pytest.mark.checklist("3. Position embeddings and transformer", "attention")
def test_attention_weights_are_returned_only_on_request_and_do_not_change_predictions(make_twins, make_batch):
    model, batch = make_twins().to(torch.float64).ours, make_batch(dtype=torch.float64)
    with torch.no_grad():
        plain = model(batch.pixel_values, batch.pixel_mask)
        eager = model(batch.pixel_values, batch.pixel_mask, output_attentions=True)
    assert plain.encoder_attentions is None
    assert largest_difference(plain.logits, eager.logits) < 1e-12
    assert eager.cross_attentions[0].sum(-1).sub(1).abs().max() < 1e-12
    model.config.output_attentions = True
    assert model(batch.pixel_values).encoder_attentions is not None


def test_no_mask_equals_a_mask_of_ones_of_any_dtype(make_twins, make_batch):
    model, batch = make_twins().ours, make_batch(sizes=((64, 96), (64, 96)))
    with torch.no_grad():
        expected = model(batch.pixel_values).logits
        for dtype in (torch.int64, torch.bool, torch.float32):
            assert torch.equal(model(batch.pixel_values, batch.pixel_mask.to(dtype)).logits, expected)


@pytest.mark.checklist("3. Position embeddings and transformer", "attention")
def test_padding_is_not_attended_to(make_twins, make_batch):
    twins, batch = make_twins(), make_batch()
    model = twins.ours.model
    with torch.no_grad():
        out = model(batch.pixel_values, batch.pixel_mask, output_attentions=True)
    cells = (4 * torch.arange(3)[:, None] + torch.arange(4))[
        :2, :3
    ].flatten()  # of 64 x 70 pixels at stride 32
    hidden = [i for i in range(12) if i not in cells.tolist()]
    for attention in (*out.encoder_attentions, *out.cross_attentions):
        assert attention[1, :, :, hidden].max() == 0
        assert attention[1, :, :, cells].min() > 0


@pytest.mark.checklist("3. Position embeddings and transformer", "fully masked image")
@pytest.mark.parametrize("autocast", [False, True])
def test_an_image_that_is_only_padding_gives_finite_outputs_and_gradients(autocast, make_twins, make_batch):
    model, batch = copy.deepcopy(make_twins().ours).train(), make_batch()
    batch.pixel_mask[1] = 0
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = model(batch.pixel_values, batch.pixel_mask, labels=batch.labels)
        weights = model(batch.pixel_values, batch.pixel_mask, output_attentions=True).encoder_attentions[0][1]
    assert weights.isfinite().all()
    out.loss.backward()
    assert out.logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.checklist("3. Position embeddings and transformer", "decoder_attention_mask")
def test_decoder_attention_mask_masks_queries_as_in_transformers(make_twins, make_batch):
    twins, batch = make_twins().to(torch.float64), make_batch(dtype=torch.float64)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, 3:], mask[1, ::2] = 0, 0
    with torch.no_grad():
        ours = twins.ours(batch.pixel_values, batch.pixel_mask, mask).logits
        theirs = twins.theirs(
            batch.pixel_values, pixel_mask=batch.pixel_mask, decoder_attention_mask=mask
        ).logits
        assert largest_difference(ours, theirs) < 1e-8
        assert largest_difference(ours, twins.ours(batch.pixel_values, batch.pixel_mask).logits) > 1e-4


@pytest.mark.checklist("3. Position embeddings and transformer", "encoder_outputs")
def test_encoder_outputs_may_be_an_output_a_tuple_or_a_tensor(make_twins, make_batch):
    twins, batch = make_twins().to(torch.float64), make_batch(dtype=torch.float64)
    memory = torch.randn(2, 12, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = twins.theirs(
            batch.pixel_values,
            pixel_mask=batch.pixel_mask,
            encoder_outputs=BaseModelOutput(last_hidden_state=memory),
        )
        for given in (DetrEncoderOutput(memory), BaseModelOutput(memory), (memory,), memory):
            ours = twins.ours(batch.pixel_values, batch.pixel_mask, encoder_outputs=given)
            assert largest_difference(ours.logits, theirs.logits) < 1e-8


@pytest.mark.checklist("3. Position embeddings and transformer", "inputs_embeds")
@pytest.mark.parametrize("with_mask", [False, True])
def test_inputs_embeds_skip_the_backbone_as_in_transformers(with_mask, make_twins):
    twins = make_twins().to(torch.float64)
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(2, 16, 64, dtype=torch.float64, generator=generator)
    queries = torch.randn(2, 12, 64, dtype=torch.float64, generator=generator)
    mask = None
    if with_mask:
        mask = torch.ones(2, 40, 40, dtype=torch.int64)
        mask[1, 25:] = 0
    kwargs = {"pixel_mask": mask, "inputs_embeds": embeds, "decoder_inputs_embeds": queries}
    with torch.no_grad():
        assert (
            largest_difference(twins.ours(**kwargs).logits, twins.theirs(pixel_values=None, **kwargs).logits)
            < 1e-8
        )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "either pixel_values or inputs_embeds"),
        ({"pixel_values": torch.zeros(3, 64, 64)}, "must be"),
        ({"inputs_embeds": torch.zeros(1, 15, 64)}, "not the area of a square feature map"),
        ({"pixel_values": torch.zeros(2, 3, 64, 64), "pixel_mask": torch.ones(2, 32, 64)}, "must agree"),
    ],
)
def test_inputs_that_do_not_fit_are_rejected(kwargs, message, make_twins):
    with pytest.raises(ValueError, match=message):
        make_twins().ours(**kwargs)


def test_a_model_accepts_only_a_config():
    with pytest.raises(TypeError, match="must be a DetrConfig, got dict"):
        DetrModel({})


@pytest.mark.checklist("3. Position embeddings and transformer", "outputs")
def test_outputs_are_accessed_by_attribute_key_and_index(make_twins, make_batch):
    model, batch = make_twins().ours, make_batch()
    with torch.no_grad():
        out = model(batch.pixel_values, labels=batch.labels)
        pair = model(batch.pixel_values, labels=batch.labels, return_dict=False)
    assert isinstance(out, DetrObjectDetectionOutput)
    assert out.loss is out["loss"] is out[0]
    assert list(out.keys()) == [
        "loss",
        "loss_dict",
        "logits",
        "pred_boxes",
        "last_hidden_state",
        "encoder_last_hidden_state",
    ]
    assert len(out) == len(out.to_tuple()) == len(pair) == 6
    assert "auxiliary_outputs" not in out
    assert out.get("auxiliary_outputs", 3) == 3
    assert dict(out.items())["logits"] is out.logits is out[2:4][0]
    with pytest.raises(KeyError, match="auxiliary_outputs"):
        out["auxiliary_outputs"]
    assert torch.equal(pair[0], out.loss)


@pytest.mark.checklist("3. Position embeddings and transformer", "auxiliary_loss and the decoder (HF bug)")
@pytest.mark.known_issue(2)
@pytest.mark.parametrize("seed", range(2))
def test_enabling_auxiliary_loss_changes_no_prediction(seed, make_twins, make_batch):
    plain = make_twins(seed=seed).ours
    auxiliary = DetrForObjectDetection(
        DetrConfig.from_dict(plain.config.to_dict(), auxiliary_loss=True)
    ).eval()
    auxiliary.load_state_dict(plain.state_dict())
    batch = make_batch(seed=seed)
    with torch.no_grad():
        a = plain(batch.pixel_values, batch.pixel_mask)
        b = auxiliary(batch.pixel_values, batch.pixel_mask, labels=batch.labels)
        intermediate = auxiliary.model(batch.pixel_values, batch.pixel_mask).intermediate_hidden_states
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(intermediate[-1], b.last_hidden_state)
    assert intermediate.shape == (3, 2, 12, 64)
    assert len(b.auxiliary_outputs) == 2
    assert not torch.allclose(b.auxiliary_outputs[0]["logits"], b.auxiliary_outputs[1]["logits"])


def test_gradients_equal_transformers(make_twins, make_batch, difference):
    twins, batch = make_twins().to(torch.float64), make_batch(dtype=torch.float64)
    ours = twins.ours(batch.pixel_values, batch.pixel_mask)
    theirs = twins.theirs(batch.pixel_values, pixel_mask=batch.pixel_mask)
    for out in (ours, theirs):
        (out.logits.square().sum() + out.pred_boxes.square().sum()).backward()
    from detr.checkpoint.key_maps import to_file_name

    own = dict(twins.ours.named_parameters())
    for name, parameter in twins.theirs.named_parameters():
        expected = parameter.grad
        scale = max(float(expected.abs().max()), 1e-3)
        assert largest_difference(own[to_file_name(name)].grad, expected) < 1e-8 * scale, name


@pytest.mark.checklist("3. Position embeddings and transformer", "gradient checkpointing, sdpa/flash/flex")
@pytest.mark.parametrize("auxiliary", [False, True])
def test_gradient_checkpointing_changes_no_gradient(auxiliary, make_twins, make_batch):
    model = copy.deepcopy(make_twins(auxiliary_loss=auxiliary, dropout=0.1).ours).double().train()
    batch = make_batch(dtype=torch.float64)
    gradients = []
    for enable in (False, True):
        model.gradient_checkpointing_enable() if enable else model.gradient_checkpointing_disable()
        model.zero_grad()
        torch.manual_seed(0)
        model(batch.pixel_values, batch.pixel_mask, labels=batch.labels).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.checklist("1. DetrConfig", "documented but unread")
@pytest.mark.parametrize("probability", [0.0, 1.0, 0.5])
def test_layerdrop_skips_layers_in_training_only_and_every_parameter_has_a_gradient(
    probability, make_twins, make_batch
):
    plain, batch = make_twins().ours, make_batch()
    config = DetrConfig.from_dict(
        plain.config.to_dict(),
        encoder_layerdrop=probability,
        decoder_layerdrop=probability,
        auxiliary_loss=True,
    )
    model = DetrForObjectDetection(config)
    model.load_state_dict(plain.state_dict())
    with torch.no_grad():
        expected = plain(batch.pixel_values).logits
        assert torch.equal(model.eval()(batch.pixel_values).logits, expected)
    torch.manual_seed(1)
    out = model.train()(batch.pixel_values, labels=batch.labels, output_hidden_states=True)
    assert (len(out.encoder_hidden_states), len(out.decoder_hidden_states)) == (3, 4)
    assert len(out.auxiliary_outputs) == 2
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    if probability == 0:
        torch.testing.assert_close(out.logits, expected)
    if probability == 1:
        assert torch.equal(out.encoder_hidden_states[0], out.encoder_hidden_states[2])
        assert out.decoder_hidden_states[2].eq(0).all()


@pytest.mark.checklist("3. Position embeddings and transformer", "encoder input dropout")
def test_only_compat_transformers_applies_dropout_to_the_input_of_the_encoder(make_twins, make_batch):
    batch = make_batch()
    for compat, dropped in (("original", False), ("transformers", True)):
        model = copy.deepcopy(make_twins(compat=compat, dropout=1.0, encoder_layers=0).ours).train()
        memory = model(batch.pixel_values).encoder_last_hidden_state
        assert bool(memory.eq(0).all()) is dropped


def test_dropout_is_active_in_training_and_reproducible_with_the_seed(make_twins, make_batch):
    model, batch = (
        copy.deepcopy(make_twins(dropout=0.3, activation_dropout=0.2, attention_dropout=0.1).ours),
        make_batch(),
    )
    model.train()
    with torch.no_grad():
        first, second, third = (
            [torch.manual_seed(seed), model(batch.pixel_values).logits][1] for seed in (0, 1, 0)
        )
    assert torch.equal(first, third)
    assert not torch.allclose(first, second)


@pytest.mark.checklist("4. Heads, segmentation head", "parameter init")
@pytest.mark.known_issue(8)
def test_a_new_model_is_initialized_as_the_original():
    torch.manual_seed(0)
    model = DetrForObjectDetection(DetrConfig(backbone="resnet18"))
    state = model.state_dict()
    assert state["model.query_position_embeddings.weight"].std() == pytest.approx(1, abs=0.02)
    layer = "model.decoder.layers.0."
    bound = {
        "encoder_attn.q_proj": (6 / 1024) ** 0.5,
        "encoder_attn.out_proj": (6 / 512) ** 0.5,
        "fc1": (6 / 2304) ** 0.5,
    }
    for name, limit in bound.items():
        weight = state[f"{layer}{name}.weight"]
        assert 0.99 * limit < weight.abs().max() <= limit
    assert state[f"{layer}self_attn.v_proj.bias"].eq(0).all()
    assert state[f"{layer}fc1.bias"].ne(0).any()
    assert state["class_labels_classifier.weight"].abs().max() <= 256**-0.5


@pytest.mark.nightly
@pytest.mark.known_issue(8)
def test_a_new_model_overfits_four_images(make_batch):
    """From scratch, with the gradient clipping of the recipe: low class and box losses after 300 steps."""
    torch.manual_seed(0)
    model = DetrForObjectDetection(
        DetrConfig(
            backbone="resnet18",
            d_model=64,
            encoder_layers=1,
            decoder_layers=2,
            encoder_ffn_dim=128,
            decoder_ffn_dim=128,
            num_queries=12,
            num_labels=5,
            dropout=0.0,
            auxiliary_loss=True,
            trainable_backbone_stages=5,
        )
    )
    batch = make_batch(sizes=((96, 96),) * 4, objects=(1, 2, 3, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    model.train()
    for _ in range(300):
        optimizer.zero_grad()
        output = model(batch.pixel_values, labels=batch.labels)
        output.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    assert output.loss_dict["loss_giou"] < 0.3
    assert output.loss_dict["loss_ce"] < 0.3


@pytest.mark.checklist("4. Heads, segmentation head", "parameter init")
def test_with_compat_transformers_a_new_model_is_initialized_as_in_transformers():
    torch.manual_seed(0)
    config = DetrConfig(backbone="resnet18", compat="transformers", init_std=0.05)
    state = DetrForObjectDetection(config).state_dict()
    for name in (
        "model.query_position_embeddings.weight",
        "model.encoder.layers.3.fc1.weight",
        "bbox_predictor.layers.0.weight",
    ):
        assert state[name].std() == pytest.approx(0.05, rel=0.03), name
    assert state["model.input_projection.bias"].eq(0).all()
    assert state["model.decoder.layernorm.weight"].eq(1).all()


@pytest.mark.checklist("2. Backbone", "freeze_backbone / unfreeze_backbone")
def test_the_backbone_can_be_frozen_and_unfrozen_and_parameters_are_counted():
    config = DetrConfig(backbone="resnet18", encoder_layers=1, decoder_layers=1)
    model = DetrModel(config)
    everything = model.num_parameters()
    backbone = sum(p.numel() for p in model.backbone.parameters())
    model.freeze_backbone()
    assert model.num_parameters(only_trainable=True) == everything - backbone
    model.unfreeze_backbone()
    assert model.num_parameters(only_trainable=True) == everything
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("activation", ["relu", "gelu_new", "quick_gelu"])
def test_a_model_can_be_pickled(activation):
    config = DetrConfig(
        backbone="resnet18", encoder_layers=1, decoder_layers=1, activation_function=activation
    )
    model = DetrModel(config)
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(loaded.decoder.layers[0].fc1.weight, model.decoder.layers[0].fc1.weight)


def test_the_error_for_an_unknown_activation_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'softsign' is not known; choose one of \['gelu'"):
        DetrModel(DetrConfig(backbone="resnet18", activation_function="softsign"))


@pytest.mark.parametrize(
    "name", ["gelu_new", "quick_gelu", "silu", "relu2", "mish", "hardswish", "leaky_relu", "tanh"]
)
def test_activations_are_those_of_transformers(name):
    from transformers.activations import ACT2FN

    from detr.model.attention import activation_function

    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    torch.testing.assert_close(activation_function(name)(x), ACT2FN[name](x), rtol=0, atol=1e-12)
