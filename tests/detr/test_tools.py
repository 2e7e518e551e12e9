"""Trainer, accelerate, PEFT and torchmetrics, used as with transformers; only the import of the model differs.

They are the optional dependencies `interop`: `pip install -e '.[interop]'`.
"""

import copy
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import detr
from detr import DetrConfig, DetrForObjectDetection, DetrImageProcessor
from tests.detr.conftest import randomize_weights, small_config

MISSING = [
    name for name in ("accelerate", "albumentations", "peft", "torchmetrics") if find_spec(name) is None
]

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.slow,
    pytest.mark.oracle,
    pytest.mark.skipif(
        bool(MISSING), reason=f"the optional dependencies `interop` are not installed: {MISSING}"
    ),
]

CLASSES = {0: "square", 1: "disk"}


class Shapes(torch.utils.data.Dataset):
    """Images with one bright rectangle each, prepared as in the object detection example of transformers."""

    def __init__(self, count: int, processor: DetrImageProcessor) -> None:
        self.count, self.processor = count, processor

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, object]:
        import albumentations

        generator = np.random.default_rng(index)
        image = generator.integers(0, 60, (80, 96, 3), dtype=np.uint8)
        x, y, width, height = (int(v) for v in generator.integers((5, 5, 20, 20), (40, 30, 50, 45)))
        category = index % 2
        image[y : y + height, x : x + width, category] = 250
        augment = albumentations.Compose(
            [albumentations.HorizontalFlip(p=0.5), albumentations.RandomBrightnessContrast(p=0.5)],
            bbox_params=albumentations.BboxParams(
                format="coco", label_fields=["category"], clip=True, min_area=25
            ),
            seed=index,
        )
        output = augment(image=image, bboxes=[[x, y, width, height]], category=[category])
        annotations = {
            "image_id": index,
            "annotations": [
                {
                    "image_id": index,
                    "category_id": int(c),
                    "iscrowd": 0,
                    "area": float(b[2] * b[3]),
                    "bbox": list(b),
                }
                for c, b in zip(output["category"], output["bboxes"], strict=True)
            ],
        }
        result = self.processor(images=output["image"], annotations=annotations, return_tensors="pt")
        return {name: value[0] for name, value in result.items()}


def collate(batch):
    return {
        "pixel_values": torch.stack([each["pixel_values"] for each in batch]),
        "pixel_mask": torch.stack([each["pixel_mask"] for each in batch]),
        "labels": [each["labels"] for each in batch],
    }


def corners(boxes, size):
    """Convert boxes cxcywh in 0..1 to xyxy in pixels of an image (height, width)."""
    height, width = (int(edge) for edge in size)
    return detr.boxes.box_cxcywh_to_xyxy(torch.as_tensor(boxes)) * torch.tensor(
        [width, height, width, height]
    )


def mean_average_precision(evaluation, processor):
    """Compute mAP as in the example of transformers, where the outputs of a batch are a tuple without the loss."""
    from torchmetrics.detection.mean_ap import MeanAveragePrecision

    metric = MeanAveragePrecision(box_format="xyxy", class_metrics=True)
    for outputs, labels in zip(evaluation.predictions, evaluation.label_ids, strict=True):
        given = SimpleNamespace(logits=torch.tensor(outputs[1]), pred_boxes=torch.tensor(outputs[2]))
        sizes = torch.tensor([label["orig_size"] for label in labels])
        predictions = processor.post_process_object_detection(given, threshold=0.0, target_sizes=sizes)
        targets = [
            {
                "boxes": corners(label["boxes"], label["orig_size"]),
                "labels": torch.tensor(label["class_labels"]),
            }
            for label in labels
        ]
        metric.update(predictions, targets)
    return {"map": metric.compute()["map"].item()}


@pytest.fixture
def processor():
    return DetrImageProcessor(
        size={"max_height": 96, "max_width": 96}, pad_size={"height": 96, "width": 96}, do_pad=True
    )


def make_model(**changes):
    torch.manual_seed(0)
    names = {"id2label": CLASSES, "label2id": {name: i for i, name in CLASSES.items()}, "num_labels": None}
    return DetrForObjectDetection(small_config(**names, **changes))


def make_trainer(tmp_path, processor, model=None, **changes):
    from transformers import Trainer, TrainingArguments

    arguments = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "eval_do_concat_batches": False,
        "remove_unused_columns": False,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_map",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return Trainer(
        model=model or make_model(auxiliary_loss=True),
        args=TrainingArguments(str(tmp_path), **(arguments | changes)),
        train_dataset=Shapes(4, processor),
        eval_dataset=Shapes(4, processor),  # accelerate truncates the labels of an incomplete last batch
        processing_class=processor,
        data_collator=collate,
        compute_metrics=partial(mean_average_precision, processor=processor),
    )


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_trainer_trains_evaluates_saves_and_resumes(gradient_checkpointing, tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, gradient_checkpointing=gradient_checkpointing)
    trainer.train()
    assert 0 <= trainer.evaluate()["eval_map"] <= 1
    trainer.model.config.save_pretrained(tmp_path)
    trainer.save_model()
    loaded = DetrForObjectDetection.from_pretrained(tmp_path)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[name]), name
    assert loaded.config.auxiliary_loss
    resumed = make_trainer(tmp_path, processor, max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3


def test_predictions_do_not_contain_ignored_outputs(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, make_model(), eval_do_concat_batches=True)
    trainer.compute_metrics = None
    ignored = ["loss_dict", "last_hidden_state", "encoder_last_hidden_state"]
    assert len(trainer.predict(Shapes(2, processor), ignore_keys=ignored).predictions) == 2


def test_a_trainer_computes_the_same_losses_as_with_the_model_of_transformers(tmp_path, processor):
    """Only the model differs. transformers' labels are relative to the padded batch, which is square here."""
    import transformers

    from tests.detr.conftest import load_into_transformers, transformers_config

    ours = make_model(auxiliary_loss=False, compat="transformers")
    randomize_weights(ours, seed=0)
    theirs = transformers.DetrForObjectDetection(transformers_config(ours.config))
    load_into_transformers(ours, theirs)
    losses = []
    for model in (ours, theirs):
        trainer = make_trainer(
            tmp_path,
            processor,
            copy.deepcopy(model),
            eval_strategy="no",
            load_best_model_at_end=False,
            save_strategy="no",
            logging_steps=1,
            max_steps=3,
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_training_loop_with_accelerate_trains_evaluates_and_saves(tmp_path, processor):
    from accelerate import Accelerator
    from torch.utils.data import DataLoader
    from torchmetrics.detection.mean_ap import MeanAveragePrecision

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = make_model(auxiliary_loss=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    loader = DataLoader(Shapes(4, processor), batch_size=1, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    assert torch.isfinite(loss)
    model.eval()
    metric = MeanAveragePrecision(box_format="xyxy")
    for batch in loader:
        with torch.no_grad():
            outputs = model(**batch)
        sizes = torch.stack([label["orig_size"] for label in batch["labels"]])
        metric.update(
            processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes),
            [
                {"boxes": corners(x["boxes"], x["orig_size"]), "labels": x["class_labels"]}
                for x in batch["labels"]
            ],
        )
    assert 0 <= metric.compute()["map"].item() <= 1
    accelerator.unwrap_model(model).save_pretrained(
        tmp_path,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    loaded = DetrForObjectDetection.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(batch["pixel_values"]).logits, model(batch["pixel_values"]).logits)


def test_bfloat16_of_accelerate_returns_outputs_in_float32(processor):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(make_model().eval())
    outputs = model(torch.rand(1, 3, 96, 96))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert type(outputs) is detr.model.outputs.DetrObjectDetectionOutput
    assert {value.dtype for value in outputs.values()} == {torch.float32}


def test_init_empty_weights_and_load_checkpoint_and_dispatch_load_a_model(tmp_path):
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch

    model = make_model().eval()
    model.save_pretrained(tmp_path)
    for include_buffers in (False, True):
        with init_empty_weights(include_buffers=include_buffers):
            empty = DetrForObjectDetection(DetrConfig.from_pretrained(tmp_path)).eval()
        assert all(parameter.is_meta for parameter in empty.parameters())
    loaded = load_checkpoint_and_dispatch(empty, str(tmp_path / "model.safetensors"), device_map={"": "cpu"})
    pixels = torch.rand(1, 3, 64, 96)
    torch.testing.assert_close(loaded(pixels).logits, model(pixels).logits)


TARGETS = {
    "backbone": r".*layer4.*conv\d",
    "attention": r".*(q_proj|k_proj|v_proj|out_proj)",
    "both": r".*(layer\d\..*conv\d|q_proj|v_proj|fc1)",
}


@pytest.mark.parametrize("targets", TARGETS)
def test_lora_on_any_layer_can_be_trained_merged_and_saved(targets, tmp_path, make_batch):
    from peft import LoraConfig, PeftModel, get_peft_model

    model, batch = make_model().eval(), make_batch(num_labels=2)
    randomize_weights(model, seed=0)
    base = copy.deepcopy(model)
    pixels = batch.pixel_values
    expected = model(pixels, batch.pixel_mask).logits
    wrapped = get_peft_model(model, LoraConfig(target_modules=TARGETS[targets], init_lora_weights=True))
    torch.testing.assert_close(wrapped(pixels, batch.pixel_mask).logits, expected, rtol=1e-4, atol=1e-5)
    wrapped(pixels, batch.pixel_mask, labels=batch.labels).loss.backward()
    updates = {name: p for name, p in wrapped.named_parameters() if "lora_B" in name}
    assert updates
    gradients = [parameter.grad for parameter in updates.values()]
    assert all(gradient is not None for gradient in gradients)
    # In the first self-attention of the decoder all values are equal, so its attention weights have no effect.
    assert sum(gradient.abs().max() > 0 for gradient in gradients) >= 0.7 * len(gradients)
    with torch.no_grad():
        for parameter in updates.values():
            parameter.normal_(std=0.05)
        trained = wrapped(pixels, batch.pixel_mask).logits
        assert (trained - expected).abs().max() > 1e-3
        torch.testing.assert_close(
            wrapped.optimize()(pixels, batch.pixel_mask).logits, trained, rtol=1e-3, atol=1e-4
        )
        wrapped.save_pretrained(tmp_path)
        reloaded = PeftModel.from_pretrained(base, tmp_path).eval()
        torch.testing.assert_close(reloaded(pixels, batch.pixel_mask).logits, trained, rtol=1e-4, atol=1e-5)
        merged = wrapped.merge_and_unload()
        torch.testing.assert_close(merged(pixels, batch.pixel_mask).logits, trained, rtol=1e-3, atol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
    assert type(merged) is DetrForObjectDetection
