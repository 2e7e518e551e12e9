"""Measure speed and utilization on a GPU. Needs torch, timm and transformers, not Ray.

    PYTHONPATH=. python benchmarks/gpu.py [--limit 790] [--json FILE]

The first table has the rows of `bench.py` about the model: ours and transformers' in turn, both in torch's default
float32, with TF32 in convolutions. The second table has images of 800 x 1066 per second in bfloat16, and which share of
the device's peak throughput this network's matrix products reach, next to transformers, eager and compiled.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import rows_model
import rows_training
import torch
import transformers
from pairs import HEAD, Row, line, timed_on_gpu
from rows_model import SIZE, image, twins
from torch import nn

GMACS = 86
"""Multiply-accumulates of a forward pass of resnet50 at 800 x 1066; the backward pass has twice as many."""
BATCH = 16
SIZES = (1, BATCH)
DEVICE = "cuda"
ROWS = [partial(make, DEVICE) for make in [*rows_model.ROWS.values(), *rows_training.ROWS.values()]]


def main() -> None:
    """Print both tables and save them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=float, default=790, help="peak bfloat16 TFLOP/s of the device")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/gpu.json"))
    options = parser.parse_args()
    machine = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()), f"\n\n{HEAD}", flush=True)
    rows: list[Row] = []
    for make in ROWS:
        rows.append(make())
        torch.cuda.empty_cache()
        print(line(rows[-1], {}), flush=True)
    for row in rows:
        if row.note:
            print(f"- {row.work}: {row.note}")
    print(f"\n| bfloat16, 800 x 1066 | images/s | share of {options.limit:g} TFLOP/s | GiB | first call, s |")
    print("|---|---|---|---|---|", flush=True)
    rates: list[dict[str, Any]] = []
    for name, batch, macs, prepare in [*_inference(), *_training()]:
        rate = _rate(prepare, batch)
        share = rate["images_per_second"] * macs * 2e-3 / options.limit
        rates.append({"work": name, "share": share, **rate})
        cells = [name, f"{rate['images_per_second']:.0f}", f"{share:.1%}"]
        print(f"| {' | '.join(cells)} | {rate['gib']:.1f} | {rate['first']:.1f} |", flush=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine, "rows": [asdict(row) for row in rows], "rates": rates}
    options.json.write_text(json.dumps(content, indent=1), encoding="utf-8")


Work = tuple[str, int, int, Callable[[], Callable[[], Any]]]


def _inference() -> list[Work]:
    ours, theirs = twins(DEVICE)
    whole, fast = theirs.bfloat16(), ours.optimize(dtype=torch.bfloat16)
    plain = ours.bfloat16()

    def call(model: Any, batch: int, masked: bool = False) -> Callable[[], Any]:
        pixels = image(DEVICE).bfloat16().repeat(batch, 1, 1, 1)
        mask = torch.ones(batch, *SIZE, dtype=torch.bool, device=DEVICE) if masked else None

        def run() -> Any:
            with torch.inference_mode():
                return model(pixels, pixel_mask=mask)

        return run

    works: list[Work] = []
    for batch in SIZES:
        models: dict[str, Any] = {
            "transformers, eager": lambda: whole,
            "transformers, torch.compile": lambda: torch.compile(whole, dynamic=False),
            "ours, not optimized": lambda: plain,
            "ours, optimized": lambda: fast,
        }
        for name, model in models.items():
            works.append(
                (
                    f"{name}, batch {batch}",
                    batch,
                    GMACS,
                    lambda model=model, batch=batch: call(model(), batch),
                )
            )
    works.append(
        (f"ours, optimized, with a mask, batch {BATCH}", BATCH, GMACS, lambda: call(fast, BATCH, masked=True))
    )
    return works


def _training() -> list[Work]:
    def stepper(model: Any) -> Callable[[], None]:
        pixels = image(DEVICE).repeat(BATCH, 1, 1, 1).contiguous(memory_format=torch.channels_last)
        mask = torch.ones(BATCH, *SIZE, dtype=torch.int64, device=DEVICE)
        labels = rows_training.labels_of(BATCH, DEVICE)
        model.train().to(memory_format=torch.channels_last)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

        def step() -> None:
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = model(pixels, pixel_mask=mask, labels=labels).loss
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 0.1)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def network(index: int) -> Any:
        return twins(DEVICE, num_labels=rows_training.LABELS, auxiliary_loss=True)[index]

    def compiled() -> Any:
        model = network(0)
        states = torch.compile(model.model.compute_states, dynamic=False, mode="reduce-overhead")
        model.model.engine = lambda _, *inputs, **options: states(*inputs, **options)
        return model

    return [
        (f"{name}, batch {BATCH}", BATCH, 3 * GMACS, lambda make=make: stepper(make()))
        for name, make in {
            "training: transformers, eager": lambda: network(1),
            "training: ours, eager": lambda: network(0),
            "training: ours, torch.compile": compiled,
        }.items()
    ]


def _rate(prepare: Callable[[], Callable[[], Any]], batch: int) -> dict[str, float]:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run = prepare()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    for _ in range(3):
        run()
    rate = batch / statistics.median(timed_on_gpu(run) for _ in range(5))
    return {
        "images_per_second": rate,
        "gib": torch.cuda.max_memory_allocated() / 2**30,
        "first": first,
    }


if __name__ == "__main__":
    main()
