"""How fast a detector learns from a pretrained backbone: our recipes, transformers' DETR, torchvision's.

    python benchmarks/learning.py --data bccd --recipes multi-scale faster-rcnn fcos --minutes 3 --seeds 0 1 2
    python benchmarks/learning.py --data nuclei nuts --minutes 3 --evaluations 1     (only the end is scored)
    python benchmarks/learning.py --data balloon --recipes better plain --minutes 30                  (masks)
    python benchmarks/learning.py --recipes multi-scale --minutes 3 --set head_convolutions=1  (an ablation)
    python benchmarks/learning.py --data bccd --recipes better --overfit 8 --minutes 5   (overfit 8 images)
    python benchmarks/learning.py --rows docs/learning.jsonl --draw          (the curves of docs/training.md)
    python benchmarks/learning.py --rows docs/learning-multi-scale.jsonl --table                 (its tables)
    PYTHONPATH=.:platform python benchmarks/learning.py --device cuda --data coco128 --minutes 5     (no Ray)

All runs of a data set have the same backbone weights, images, order and augmentation; what differs is the
network behind the backbone and its training. Time is the process's CPU time over `--threads`, without
evaluation, so that other work on the machine does not count. On a GPU the transformer is DETR's own, images
have its sizes, sixteen are a batch, products are in bfloat16, and time is the clock's.

`--set` changes settings of the recipes (see `learning_recipes.change`); the row says which. Rows are appended
to `--rows`; next to it, FILE-DATA.png has the curves of the unchanged recipes.
"""

import argparse
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from learning_curves import draw, print_table
from learning_data import ahead, batches, folder_of, read, score
from learning_networks import build
from learning_recipes import ON_GPU, RECIPES, SMALL, TASKS, Recipe, Task, change
from torch import nn

from detr import DetrForSegmentation
from detr.image_processing.augment import AugmentSpec
from detr.model.initialization import init_local_attention, init_mask_scales
from detr.training.query_groups import QueryGroups
from raydetr.training.optim import MovingAverage

ROWS = Path("runs/benchmarks/learning.jsonl")


def run(
    task: Task,
    labels: Mapping[str, Any],
    recipe: Recipe,
    minutes: float,
    seed: int,
    threads: int,
    evaluations: int,
    overfit: int = 0,
    device: str = "cpu",
) -> list[dict]:
    """Train for a time; one row for each evaluation.

    Args:
        task: the data set.
        labels: what every row says of the run, besides what is measured.
        recipe: what is trained.
        minutes: of one thread's CPU time, or of a GPU.
        seed: of the weights, the order and the augmentation.
        threads: of torch.
        evaluations: how many, evenly spread.
        overfit: so many images are what is trained on, without augmentation, and what is scored.
        device: cpu or cuda.
    """
    torch.set_num_threads(threads)
    gpu, folder = device == "cuda", folder_of(task)
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
        {"params": [p for n, p in parameters if not _is_backbone(n)], "peak": recipe.learning_rate},
        {"params": [p for n, p in parameters if _is_backbone(n)], "peak": recipe.backbone_learning_rate},
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
                **labels,
                "device": torch.cuda.get_device_name() if gpu else device,
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


def _is_backbone(name: str) -> bool:
    """Whether a parameter is pretrained; torchvision counts the pyramid to the backbone."""
    return "backbone" in name and ".fpn." not in name


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


def main() -> None:
    """Run, print rows, write them and draw the curves."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", nargs="+", choices={**TASKS, **ON_GPU}, default=["bccd"])
    parser.add_argument(
        "--recipes", nargs="+", choices=RECIPES, default=["multi-scale", "better", "faster-rcnn", "fcos"]
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--evaluations", type=int, default=10)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--overfit", type=int, default=0, help="train on so many images and score those")
    parser.add_argument(
        "--edge", type=int, help="another shorter side of test images, training in proportion"
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="other settings of the recipes"
    )
    parser.add_argument("--rows", type=Path, default=ROWS, help="the file to which rows are added")
    parser.add_argument("--draw", action="store_true", help="only draw the curves of the file")
    parser.add_argument("--table", action="store_true", help="only print the tables of the file")
    given = parser.parse_args()
    if given.draw or given.table:
        if given.draw:
            draw(given.rows)
        if given.table:
            print_table(given.rows)
        return
    tasks = ON_GPU if given.device == "cuda" else TASKS
    for data in given.data:
        if data not in tasks:
            parser.error(f"{data} is not learned on {given.device}")
        if tasks[data].masks and any(RECIPES[name].library == "torchvision" for name in given.recipes):
            parser.error(
                f"{data} has masks, which torchvision's detectors here do not learn: take another --data"
            )
    try:
        recipes = {name: change(RECIPES[name], given.set) for name in given.recipes}
    except ValueError as error:
        parser.error(str(error))
    given.rows.parent.mkdir(parents=True, exist_ok=True)
    figures = (given.threads, given.evaluations, given.overfit, given.device)
    for seed in given.seeds:
        for data in given.data:
            task = tasks[data] if given.edge is None else tasks[data].at_edge(given.edge)
            for name, (recipe, changes) in recipes.items():
                labels = {"data": data, "recipe": name, "edge": task.test_edge, "changes": changes}
                rows = run(task, labels, recipe, given.minutes, seed, *figures)
                with given.rows.open("a") as out:
                    out.writelines(json.dumps({**row, "settings": asdict(recipe)}) + "\n" for row in rows)
                draw(given.rows)


if __name__ == "__main__":
    main()
