"""The model card of a registered version."""

import json
import os
from collections.abc import Mapping
from typing import Any

from raydetr.registry.tags import CHOSEN_ON_TAG, TRAINED_ON_TAG
from raydetr.registry.tracking import GIT_TAG

_TEXT = """---
tags: [object-detection, detr]
---
# {name}

DETR object detector ({backbone}, {queries} queries), trained with raydetr.

- classes: {classes}
- training data (digest of the shards): {trained_on}
- validation data that selected the checkpoint or stopped training (digest of the shards): {chosen_on}
- training run: {run_id} ({run_name})
- code revision: {revision}
{tags}
## Metrics

{metrics}

Evaluations are not part of this card, which is written before them. They are stored as tags of the registered version
(`evaluation.<data digest>`), with reports in its directory (`reports/`). Each promotion decision is also a tag
(`promotion.…`).

## Intended use and limits

The model detects objects of the classes above in images similar to its training data. It has not been tested on other
data: evaluate it before using it with other cameras, places or subjects. Scores are not probabilities; choose a
threshold from an evaluation report. The model cannot detect classes that it was not trained on. It is not meant to
identify persons, or to make decisions without human review where a mistake can harm someone.

## How to load

```python
from detr import {kind}, DetrImageProcessor{also}

model = {kind}.from_pretrained(folder)
image_processor = DetrImageProcessor.from_pretrained(folder)
```
"""


def model_card(
    folder: str,
    name: str,
    run: Any,
    tags: Mapping[str, str],
    metrics: Mapping[str, float] | None = None,
) -> str:
    """Write the model card of a version, the Markdown of its README.md.

    Args:
        folder: model folder with config.json.
        name: registered name.
        run: MLflow entity of the training run.
        tags: tags of the version, listed one per line.
        metrics: metrics of the training, such as losses and `val_AP`, shown as a table.
    """
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as stream:
        config = json.load(stream)
    labels = config.get("id2label") or {}
    masks = "DetrForSegmentation" in (config.get("architectures") or ())
    rows = "".join(f"| {key} | {value:.6g} |\n" for key, value in (metrics or {}).items())
    return _TEXT.format(
        name=name,
        backbone=config.get("backbone") or "backbone in config.json",
        queries=config.get("num_queries", "?"),
        classes=", ".join(str(labels[key]) for key in sorted(labels, key=int)) or "not named",
        trained_on=tags.get(TRAINED_ON_TAG, "not known"),
        chosen_on=tags.get(CHOSEN_ON_TAG, "none"),
        run_id=run.info.run_id,
        run_name=run.info.run_name,
        revision=run.data.tags.get(GIT_TAG, "not known"),
        tags="".join(
            f"- {key}: {value}\n"
            for key, value in sorted(tags.items())
            if key not in (TRAINED_ON_TAG, CHOSEN_ON_TAG)
        ),
        metrics=f"| training | |\n|---|---|\n{rows}"
        if rows
        else "No metrics were available at registration.",
        kind="DetrForSegmentation" if masks else "DetrForObjectDetection",
        also="  # or from transformers" if _loads_in_transformers(config) else "",
    )


def _loads_in_transformers(config: Mapping[str, Any]) -> bool:
    """Return whether transformers gives the same predictions for this folder; see "Loading" in docs/detr.md."""
    if config.get("multi_scale"):
        return False
    backbone = str((config.get("backbone_config") or {}).get("backbone") or "resnet")
    return config.get("compat") == "transformers" or backbone.startswith("resnet")
