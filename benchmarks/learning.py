"""Compare how fast detectors learn from a pretrained backbone: our recipes, DETR of transformers, torchvision.

    python benchmarks/learning.py --data bccd --recipes multi-scale faster-rcnn fcos --minutes 3 --seeds 0 1 2
    python benchmarks/learning.py --data nuclei nuts --minutes 3 --evaluations 1     (score the end only)
    python benchmarks/learning.py --data balloon --recipes better plain --minutes 30                  (masks)
    python benchmarks/learning.py --recipes multi-scale --minutes 3 --set head_convolutions=1  (an ablation)
    python benchmarks/learning.py --data bccd --recipes better --overfit 8 --minutes 5   (overfit 8 images)
    python benchmarks/learning.py --rows docs/learning.jsonl --draw          (the curves of docs/training.md)
    python benchmarks/learning.py --rows docs/learning-multi-scale.jsonl --table                 (its tables)
    PYTHONPATH=.:platform python benchmarks/learning.py --device cuda --data coco128 --minutes 5     (no Ray)

All runs of a data set have the same backbone weights, images, order and augmentation; they differ in the network after
the backbone and in its training. Time is the process's CPU time divided by `--threads`, without evaluation, so other
work on the machine does not count. On a GPU, the transformer and the image sizes are those of DETR, the batch size is
16, products are in bfloat16, and time is wall time.

`--set` changes settings of the recipes (see `learning_recipes.change`), which are recorded in the rows. Rows are
appended to `--rows`; the curves of the unchanged recipes are plotted next to it, in FILE-DATA.png.
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
from learning_data import batches, folder_of, prefetch, read, score
from learning_networks import build
from learning_recipes import ON_GPU, RECIPES, SMALL, TASKS, Recipe, Task, change
from torch import nn

from detr import DetrForSegmentation
from detr.image_processing.augment_spec import AugmentSpec
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
    """Train for a fixed time; return one row per evaluation.

    Args:
        task: the data set.
        labels: entries that describe the run in every row.
        recipe: network and training settings.
        minutes: time budget: CPU minutes per thread, or wall time on a GPU.
        seed: seed of the weights, the order and the augmentation.
        threads: number of torch threads.
        evaluations: number of evaluations, evenly spaced.
        overfit: if not 0, train on this many images without augmentation, and score the same images.
        device: cpu or cuda.
    """
    torch.set_num_threads(threads)
    gpu, folder = device == "cuda", folder_of(task)
    (train, ground_truth), (val, val_ground_truth) = (
        read(folder / annotations, folder / images, task.masks)
        for annotations, images in (task.train, task.val)
    )
    augmentation = task.augmentation
    no_augmentation = AugmentSpec.none(task.test_edge, augmentation.longest_edge)
    if overfit:
        train, ground_truth, augmentation = train[:overfit], _first(ground_truth, overfit), no_augmentation
        val, val_ground_truth = train, ground_truth
    names = [each["name"] for each in ground_truth["categories"]]
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
    for batch in prefetch(in_order, threads) if gpu else in_order:
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
        metrics = score(model, val, val_ground_truth, no_augmentation, task.masks)
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
                **{k: round(v, 4) for k, v in metrics.items()},
                **losses,
            }
        )
        recent = []
        print(json.dumps(rows[-1]), flush=True)
        if len(rows) == evaluations:
            return rows
    return rows


def _is_backbone(name: str) -> bool:
    """Return whether a parameter is pretrained; torchvision's "backbone" includes the pyramid, which is not."""
    return "backbone" in name and ".fpn." not in name


def _first(ground_truth: dict[str, Any], count: int) -> dict[str, Any]:
    """Reduce a COCO annotation file to its first images."""
    images = ground_truth["images"][:count]
    ids = {each["id"] for each in images}
    annotations = [each for each in ground_truth["annotations"] if each["image_id"] in ids]
    return {**ground_truth, "images": images, "annotations": annotations}


def learning_rate_share(done: float, recipe: Recipe) -> float:
    """Return the learning rate as a fraction of its peak; `done` in 0..1 is the fraction of time used."""
    warmup = min(1.0, (done + 1e-3) / recipe.warmup) if recipe.warmup else 1.0
    if recipe.schedule == "cosine":
        return warmup * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
    return warmup * (1.0 if done < 2 / 3 else 0.1)


def main() -> None:
    """Run; print and write the rows; plot the curves."""
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
    parser.add_argument("--overfit", type=int, default=0, help="train on this many images and score them")
    parser.add_argument(
        "--edge", type=int, help="shorter side of test images; training sizes are scaled in proportion"
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the recipes to change"
    )
    parser.add_argument("--rows", type=Path, default=ROWS, help="file to append the rows to")
    parser.add_argument("--draw", action="store_true", help="only plot the curves of the file")
    parser.add_argument("--table", action="store_true", help="only print the tables of the file")
    arguments = parser.parse_args()
    if arguments.draw or arguments.table:
        if arguments.draw:
            draw(arguments.rows)
        if arguments.table:
            print_table(arguments.rows)
        return
    tasks = ON_GPU if arguments.device == "cuda" else TASKS
    for data in arguments.data:
        if data not in tasks:
            parser.error(
                f"--data {data} has no settings for --device {arguments.device}: choose from {list(tasks)}"
            )
        if tasks[data].masks and any(RECIPES[name].library == "torchvision" for name in arguments.recipes):
            parser.error(
                f"--data {data} has masks, which the torchvision detectors here do not learn: choose another --data"
            )
    try:
        recipes = {name: change(RECIPES[name], arguments.set) for name in arguments.recipes}
    except ValueError as error:
        parser.error(str(error))
    arguments.rows.parent.mkdir(parents=True, exist_ok=True)
    options = (arguments.threads, arguments.evaluations, arguments.overfit, arguments.device)
    for seed in arguments.seeds:
        for data in arguments.data:
            task = tasks[data] if arguments.edge is None else tasks[data].at_edge(arguments.edge)
            for name, (recipe, changes) in recipes.items():
                labels = {"data": data, "recipe": name, "edge": task.test_edge, "changes": changes}
                rows = run(task, labels, recipe, arguments.minutes, seed, *options)
                with arguments.rows.open("a") as out:
                    out.writelines(json.dumps({**row, "settings": asdict(recipe)}) + "\n" for row in rows)
                draw(arguments.rows)


if __name__ == "__main__":
    main()
