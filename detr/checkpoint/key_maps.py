"""Tensor names in checkpoint files.

Our parameters have the names that transformers writes to disk (the same in versions 4 and 5), so saving renames
nothing, except in a ResNet of transformers. Four other layouts can be read: the names at run time in transformers 5,
the ResNet of transformers (the ``no_timm`` revisions on the hub), learned position embeddings of transformers 4, and
checkpoints of facebookresearch/detr.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set

from torch import Tensor

BACKBONE_PREFIX = "backbone.conv_encoder.model."

_RUN_TIME = (
    (r"(^|\.)backbone\.model\.", r"\1backbone.conv_encoder.model."),
    (r"\.(self_attn|encoder_attn)\.o_proj\.", r".\1.out_proj."),
    (r"\.layers\.(\d+)\.mlp\.(fc1|fc2)\.", r".layers.\1.\2."),
    (r"(^|\.)backbone\.position_embedding\.", r"\1position_embedding."),
    (r"^bbox_attention\.([qk])_proj\.", r"bbox_attention.\1_linear."),
    (r"^mask_head\.conv([12])\.conv\.", r"mask_head.lay\1."),
    (r"^mask_head\.conv([12])\.norm\.", r"mask_head.gn\1."),
    (r"^mask_head\.output_conv\.", r"mask_head.out_lay."),
)
_MASK_STAGE = re.compile(r"^mask_head\.fpn_stages\.(\d)\.(fpn_adapter|refine\.conv|refine\.norm)\.")
_RESNET_STEM = re.compile(r"\.model\.embedder\.embedder\.(convolution|normalization)\.")
_RESNET_BLOCK = re.compile(
    r"\.model\.encoder\.stages\.(\d+)\.layers\.(\d+)\.(?:shortcut|layer\.(\d+))\.(convolution|normalization)\."
)
_ORIGINAL: tuple[tuple[str, str], ...] = (
    (r"^(detr\.)?backbone\.0\.body\.", r"\1model." + BACKBONE_PREFIX),
    (r"^(detr\.)?backbone\.1\.row_embed\.", r"\1model.position_embedding.row_embeddings."),
    (r"^(detr\.)?backbone\.1\.col_embed\.", r"\1model.position_embedding.column_embeddings."),
    (r"^(detr\.)?input_proj\.", r"\1model.input_projection."),
    (r"^(detr\.)?query_embed\.", r"\1model.query_position_embeddings."),
    (r"^(detr\.)?class_embed\.", r"\1class_labels_classifier."),
    (r"^(detr\.)?bbox_embed\.", r"\1bbox_predictor."),
    (r"^(detr\.)?transformer\.decoder\.norm\.", r"\1model.decoder.layernorm."),
    (r"^(detr\.)?transformer\.", r"\1model."),
    (r"\.linear([12])\.", r".fc\1."),
    (r"\.multihead_attn\.", r".encoder_attn."),
    (r"\.norm1\.", r".self_attn_layer_norm."),
    (r"(encoder\.layers\.\d+)\.norm2\.", r"\1.final_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm2\.", r"\1.encoder_attn_layer_norm."),
    (r"\.norm3\.", r".final_layer_norm."),
)


def to_file_name(name: str) -> str:
    """Convert any name that transformers gives to a tensor to the name in our files."""
    for pattern, replacement in _RUN_TIME:
        name = re.sub(pattern, replacement, name)
    name = _MASK_STAGE.sub(_mask_layer, name)
    name = _RESNET_STEM.sub(lambda m: ".model.conv1." if m[1] == "convolution" else ".model.bn1.", name)
    return _RESNET_BLOCK.sub(_timm_block, name)


def _mask_layer(match: re.Match[str]) -> str:
    stage, kind = int(match[1]), match[2]
    if kind == "fpn_adapter":
        return f"mask_head.adapter{stage + 1}."
    return f"mask_head.{'lay' if kind == 'refine.conv' else 'gn'}{stage + 3}."


def _timm_block(match: re.Match[str]) -> str:
    stage, block, layer, kind = match.groups()
    prefix = f".model.layer{int(stage) + 1}.{block}."
    if layer is None:
        return prefix + ("downsample.0." if kind == "convolution" else "downsample.1.")
    return prefix + ("conv" if kind == "convolution" else "bn") + f"{int(layer) + 1}."


def to_resnet_name(name: str) -> str:
    """Convert a tensor name of timm's ResNet to that in the ResNet of transformers; other names stay unchanged."""
    head, backbone, tail = name.partition(BACKBONE_PREFIX)
    if not backbone:
        return name
    *modules, tensor = tail.split(".")
    kind = "convolution" if modules[-1] == "0" or modules[-1].startswith("conv") else "normalization"
    if len(modules) == 1:
        return f"{head}{backbone}embedder.embedder.{kind}.{tensor}"
    part = "shortcut" if modules[2] == "downsample" else f"layer.{int(modules[2][-1]) - 1}"
    return (
        f"{head}{backbone}encoder.stages.{int(modules[0][-1]) - 1}.layers.{modules[1]}.{part}.{kind}.{tensor}"
    )


def from_original(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the tensors of a checkpoint of facebookresearch/detr to the layout of our files.

    Its attention has one matrix [3 D, D] for q, k and v, in that order; it is split into three.
    """
    out = {}
    for original, tensor in tensors.items():
        name = original
        # Names inside the backbone and the mask head also match patterns of the transformer: only convert their prefix.
        prefix_only = re.match(r"(detr\.)?(backbone\.0\.body|mask_head|bbox_attention)\.", name)
        for pattern, replacement in _ORIGINAL[:1] if prefix_only else _ORIGINAL:
            name = re.sub(pattern, replacement, name)
        if ".in_proj_" in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                out[name.replace(".in_proj_", f".{part}_proj.")] = rows.clone()
        else:
            out[name] = tensor
    return out


def is_original(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the tensors have the names of a checkpoint of facebookresearch/detr."""
    return any(re.match(r"(detr\.)?backbone\.0\.body\.", name) for name in tensors)


def adapt_names(tensors: Mapping[str, Tensor], names: Set[str]) -> dict[str, Tensor]:
    """Rename the tensors of a file to the names of a model, which may be of a different DETR class.

    ``num_batches_tracked`` is dropped if the model does not have it, as in frozen batch norm.

    Args:
        tensors: tensors in any of the known layouts.
        names: names of the model's tensors. The prefixes ``model.`` and ``detr.`` are added or removed so that most
            names match.
    """
    if is_original(tensors):
        tensors = from_original(tensors)
    named = {to_file_name(name): tensor for name, tensor in tensors.items()}
    candidates = [named]
    for prefix in ("model.", "detr.", "detr.model."):
        candidates.append({name.removeprefix(prefix): tensor for name, tensor in named.items()})
        candidates.append({prefix + name: tensor for name, tensor in named.items()})
    best = max(candidates, key=lambda candidate: len(names & candidate.keys()))
    return {k: v for k, v in best.items() if k in names or not k.endswith("num_batches_tracked")}
