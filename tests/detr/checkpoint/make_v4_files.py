"""Write the folder v4_files next to this file: tiny checkpoints saved by transformers 4, with their predictions.

    python -m venv /tmp/v4 && /tmp/v4/bin/pip install 'transformers==4.57.3' torch torchvision timm
    /tmp/v4/bin/python tests/detr/checkpoint/make_v4_files.py

The folder is part of the repository, and test_v4_files.py reads it.
"""

import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "v4_files"
TINY = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "num_queries": 5,
    "num_labels": 4,
}
TIMM = {"backbone": "test_resnet", "use_timm_backbone": True, "use_pretrained_backbone": False}
NO_TIMM = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_config": transformers.ResNetConfig(
        embedding_size=64,
        hidden_sizes=[8, 12, 16, 24],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    ),
}
CASES = {
    "detection": ("DetrForObjectDetection", TIMM),
    "segmentation": ("DetrForSegmentation", NO_TIMM),
    "learned": ("DetrForObjectDetection", {**NO_TIMM, "position_embedding_type": "learned"}),
    "no_timm": ("DetrForObjectDetection", NO_TIMM),
}


@torch.no_grad()
def main() -> None:
    """Create each model with random weights, and save it together with its predictions for a padded batch."""
    assert transformers.__version__.startswith("4."), transformers.__version__
    shutil.rmtree(FOLDER, ignore_errors=True)
    for name, (model_class, values) in CASES.items():
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(transformers.DetrConfig(**TINY, **values)).eval()
        for parameter_name, parameter in model.named_parameters():
            if "query_position" in parameter_name:
                parameter.normal_(std=3)
            elif parameter.ndim > 1:
                parameter.normal_(std=2 * parameter[0].numel() ** -0.5)
        if model_class == "DetrForSegmentation":
            # attention weights are small compared with the features: scale both so that masks depend on attention
            model.bbox_attention.q_linear.weight *= 6
            model.mask_head.lay1.weight[:, : TINY["d_model"]] *= 1e-6
            model.mask_head.lay1.weight[:, TINY["d_model"] :] *= 60
            model.mask_head.adapter1.weight *= 1e-6
            model.mask_head.adapter2.weight *= 1e-6
            model.mask_head.adapter3.weight *= 1e-6
        model.half().save_pretrained(FOLDER / name)  # smaller files; predictions use the rounded weights
        model.float()
        pixel_values = torch.randn(2, 3, 48, 64)
        pixel_mask = torch.ones(2, 48, 64, dtype=torch.int64)
        pixel_mask[1, 30:] = 0
        outputs = model(pixel_values=pixel_values, pixel_mask=pixel_mask)
        answer = {key: outputs[key] for key in ("logits", "pred_boxes", "pred_masks") if key in outputs}
        save_file(
            {"pixel_values": pixel_values, "pixel_mask": pixel_mask, **answer},
            FOLDER / name / "answer.safetensors",
        )
        print(name, {key: (tuple(v.shape), float(v.std())) for key, v in answer.items()})


if __name__ == "__main__":
    main()
