"""The model card that travels with every registered version."""

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
- data that chose the checkpoint or the end of training: {chosen_on}
- training run: {run_id} ({run_name})
- code revision: {revision}
{tags}
## Figures

{figures}

Evaluations come later than this card: they are tags of the registered version (`evaluation.<data digest>`), their
reports lie in its directory (`reports/`), and each decision to promote it or not is a tag as well (`promotion.…`).

## Intended use and limits

Detecting objects of the classes above in images like those it was trained on. It has been tested on nothing else: on
other cameras, places or subjects its figures do not hold before it is evaluated there. Scores are not probabilities;
choose a threshold by the report of an evaluation. It knows nothing of classes that it was not trained on, and is not
meant to identify persons or to decide alone where a mistake can harm someone.

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
    figures: Mapping[str, float] | None = None,
) -> str:
    """Markdown for the README.md of a version.

    Args:
        folder: the model's folder, for its config.json.
        name: registered name.
        run: MLflow's entity of the run that trained it.
        tags: of the version, listed one a line.
        figures: what is known of it, e.g. losses and `val_AP`; a table.
    """
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as stream:
        config = json.load(stream)
    labels = config.get("id2label") or {}
    masks = "DetrForSegmentation" in (config.get("architectures") or ())
    rows = "".join(f"| {key} | {value:.6g} |\n" for key, value in (figures or {}).items())
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
        figures=f"| of training | |\n|---|---|\n{rows}" if rows else "None were known when this was written.",
        kind="DetrForSegmentation" if masks else "DetrForObjectDetection",
        also="  # or from transformers" if _is_of_transformers(config) else "",
    )


def _is_of_transformers(config: Mapping[str, Any]) -> bool:
    """Whether transformers predicts the same from this folder: see "Loading" in docs/detr.md."""
    if config.get("multi_scale"):
        return False
    backbone = str((config.get("backbone_config") or {}).get("backbone") or "resnet")
    return config.get("compat") == "transformers" or backbone.startswith("resnet")
