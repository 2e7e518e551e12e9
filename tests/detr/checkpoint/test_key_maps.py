"""Loading checkpoints of facebookresearch/detr; its transformer is reimplemented here with its parameter names."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from detr.checkpoint.key_maps import from_original, to_file_name, to_resnet_name
from detr.checkpoint.load_save import load_weights
from detr.config import DetrConfig
from detr.model.detection import DetrForObjectDetection


class OriginalEncoderLayer(nn.Module):
    def __init__(self, dim, heads, ffn):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads)
        self.linear1, self.linear2 = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x, padding, position):
        at = x + position
        x = self.norm1(x + self.self_attn(at, at, x, key_padding_mask=padding)[0])
        return self.norm2(x + self.linear2(self.linear1(x).relu()))


class OriginalDecoderLayer(nn.Module):
    def __init__(self, dim, heads, ffn):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads)
        self.multihead_attn = nn.MultiheadAttention(dim, heads)
        self.linear1, self.linear2 = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x, memory, padding, position, query):
        x = self.norm1(x + self.self_attn(x + query, x + query, x)[0])
        x = self.norm2(
            x + self.multihead_attn(x + query, memory + position, memory, key_padding_mask=padding)[0]
        )
        return self.norm3(x + self.linear2(self.linear1(x).relu()))


class Original(nn.Module):
    """The module tree of the original; the backbone and position embeddings are ours."""

    def __init__(self, ours: DetrForObjectDetection):
        super().__init__()
        config = ours.config
        sizes = (config.d_model, config.encoder_attention_heads, config.encoder_ffn_dim)
        holder = nn.Module()
        holder.body = ours.model.backbone.conv_encoder.model
        self.backbone = nn.ModuleList([holder])
        self.input_proj = nn.Conv2d(ours.model.input_projection.in_channels, config.d_model, 1)
        self.query_embed = nn.Embedding(config.num_queries, config.d_model)
        self.transformer = nn.Module()
        self.transformer.encoder = nn.Module()
        self.transformer.encoder.layers = nn.ModuleList(
            [OriginalEncoderLayer(*sizes) for _ in range(config.encoder_layers)]
        )
        self.transformer.decoder = nn.Module()
        self.transformer.decoder.layers = nn.ModuleList(
            [OriginalDecoderLayer(*sizes) for _ in range(config.decoder_layers)]
        )
        self.transformer.decoder.norm = nn.LayerNorm(config.d_model)
        self.class_embed = nn.Linear(config.d_model, config.num_labels + 1)
        self.bbox_embed = nn.Module()
        widths = [config.d_model] * 3 + [4]
        self.bbox_embed.layers = nn.ModuleList([nn.Linear(a, b) for a, b in pairwise(widths)])

    def forward(self, pixels: Tensor, real: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits and boxes of all decoder layers, [L, B, Q, ...].

        Args:
            pixels: float [B, 3, H, W].
            real: bool [B, h, w], False on padding.
            position: float [B, D, h, w].
        """
        x = self.input_proj(self.backbone[0].body(pixels)[-1]).flatten(2).permute(2, 0, 1)
        position, padding = position.flatten(2).permute(2, 0, 1), ~real.flatten(1)
        for layer in self.transformer.encoder.layers:
            x = layer(x, padding, position)
        query = self.query_embed.weight[:, None].expand(-1, len(pixels), -1)
        out, intermediate = torch.zeros_like(query), []
        for layer in self.transformer.decoder.layers:
            out = layer(out, x, padding, position, query)
            intermediate.append(self.transformer.decoder.norm(out))
        hidden = torch.stack(intermediate).transpose(1, 2)
        boxes = hidden
        for i, layer in enumerate(self.bbox_embed.layers):
            boxes = layer(boxes).relu() if i < 2 else layer(boxes)
        return self.class_embed(hidden), boxes.sigmoid()


@pytest.mark.checklist("8. Weights, saving, pipeline, evaluation", "original .pth")
@pytest.mark.known_issue(2)
@pytest.mark.parametrize("seed", range(2))
def test_a_checkpoint_of_the_original_predicts_the_same_as_the_original_in_every_layer(
    seed, make_twins, make_batch
):
    ours = make_twins(seed=seed, auxiliary_loss=True).to(torch.float64).ours
    torch.manual_seed(seed)
    original = Original(ours).double().eval()
    for parameter in original.transformer.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=2 * parameter.shape[1] ** -0.5)
        else:
            nn.init.normal_(parameter, mean=float(parameter.data.mean()), std=0.1)
    load_weights(ours, original.state_dict(), "a file of the original")
    batch = make_batch(dtype=torch.float64)
    real = torch.nn.functional.interpolate(batch.pixel_mask[None].double(), (3, 4))[0].bool()
    position = ours.model.position_embedding(real, torch.float64)
    with torch.no_grad():
        logits, boxes = original(batch.pixel_values, real, position)
        out = ours(batch.pixel_values, batch.pixel_mask, labels=batch.labels)
    assert logits.std(2).mean() > 1e-3
    layers = [*out.auxiliary_outputs, out]
    for layer, outputs in enumerate(layers):
        torch.testing.assert_close(outputs["logits"], logits[layer], rtol=0, atol=1e-10)
        torch.testing.assert_close(outputs["pred_boxes"], boxes[layer], rtol=0, atol=1e-10)


def test_the_names_of_the_original_cover_learned_positions_and_the_mask_head():
    names = {
        "detr.backbone.1.row_embed.weight": "detr.model.position_embedding.row_embeddings.weight",
        "detr.backbone.1.col_embed.weight": "detr.model.position_embedding.column_embeddings.weight",
        "detr.backbone.0.body.layer1.0.bn1.weight": "detr.model.backbone.conv_encoder.model.layer1.0.bn1.weight",
        "detr.transformer.decoder.layers.3.norm2.bias": "detr.model.decoder.layers.3.encoder_attn_layer_norm.bias",
        "detr.class_embed.bias": "detr.class_labels_classifier.bias",
        "mask_head.lay1.weight": "mask_head.lay1.weight",
        "bbox_attention.q_linear.weight": "bbox_attention.q_linear.weight",
    }
    tensors = {name: torch.full((1,), float(i)) for i, name in enumerate(names)}
    assert from_original(tensors) == {names[name]: tensor for name, tensor in tensors.items()}


def test_names_of_the_resnet_of_transformers_convert_back_and_forth():
    model = DetrForObjectDetection(DetrConfig(backbone="resnet26", encoder_layers=1, decoder_layers=1))
    for name in model.state_dict():
        renamed = to_resnet_name(name)
        assert (".encoder.stages." in renamed or ".embedder." in renamed) == ("conv_encoder" in name)
        assert to_file_name(renamed) == name
