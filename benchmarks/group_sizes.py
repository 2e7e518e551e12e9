"""Measure the effect of size grouping on AP: train on bccd with and without it, three seeds each.

    python benchmarks/group_sizes.py --model runs/demo/train/model [--steps 600]

The demo's model is fine-tuned on white cells and platelets (there are too many red cells for its queries). A wide range
of sizes and crops gives images of different sizes to group.
"""

import argparse
import statistics
from pathlib import Path

from raydetr import cluster, storage
from raydetr.config import EvaluateConfig
from raydetr.data.ingest.ingest import ingest
from raydetr.data.ingest.inputs import InputPaths
from raydetr.evaluation.evaluate import evaluate
from raydetr.flat_keys import override
from raydetr.training.recipes import detr_small
from raydetr.training.trainer import train

SOURCE = Path(__file__).parents[2] / "shared" / "data" / "bccd"
WORK = Path("runs/benchmarks/group_sizes").absolute()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--model", required=True, help="folder of the model to start from")
    arguments = parser.parse_args()
    steps = arguments.steps
    cluster.connect(cpus=4)
    storage.write_json(str(WORK / "classes.json"), {"RBC": None})
    for part in ("train", "val"):
        files = InputPaths(
            str(SOURCE / f"{part}.json"), str(SOURCE / "images"), classes=str(WORK / "classes.json")
        )
        ingest(files, str(WORK / part))
    config = override(
        detr_small(),
        train_data=str(WORK / "train"),
        steps=steps,
        model=str(Path(arguments.model).absolute()),
        shortest_edges=(80, 96, 112, 128, 144),
        longest_edge=192,
        test_edge=128,
        crop=True,
        crop_shortest_edges=(96, 112, 128),
        crop_sizes=(64, 112),
        name="",
        experiment="group_sizes",
        tracking_uri=f"sqlite:///{WORK}/mlflow.db",
    )
    aps: dict[bool, list[float]] = {False: [], True: []}
    print("| seed | grouped | AP | AP50 | images/s |\n|---|---|---|---|---|")
    for seed in range(3):
        for grouped in (False, True):
            output = str(WORK / f"{steps}-{seed}-{'grouped' if grouped else 'plain'}")
            result = train(override(config, seed=seed, group_sizes=grouped, output=output))
            scored = evaluate(EvaluateConfig(model=result.model_folder, data=str(WORK / "val")))
            aps[grouped].append(scored.metrics["AP"])
            print(
                f"| {seed} | {'yes' if grouped else 'no'} | {scored.metrics['AP']:.3f} | {scored.metrics['AP50']:.3f} "
                f"| {result.images_per_second:.0f} |",
                flush=True,
            )
    plain, grouped_ap = statistics.mean(aps[False]), statistics.mean(aps[True])
    print(f"\nmean AP {plain:.3f} plain, {grouped_ap:.3f} grouped")


if __name__ == "__main__":
    main()
