"""The model card that travels with every registered version."""

import json
import os
from collections.abc import Mapping
from typing import Any

from raydetr.registry.tracking import GIT_TAG

_TEXT = """---
tags: [object-detection, detr]
---
# {name}

DETR object detector ({backbone}, {queries} queries), trained with raydetr.

- classes: {classes}
- training run: {run_id} ({run_name})
- code revision: {revision}
{tags}
Intended use: detecting objects of the classes above in images like those it was trained on. It has been
tested on nothing else; its figures on a data set are tags of the registered version (`evaluation.<digest>`).

```python
from detr import DetrForObjectDetection, DetrImageProcessor  # or from transformers

model = DetrForObjectDetection.from_pretrained(folder)
image_processor = DetrImageProcessor.from_pretrained(folder)
```
"""


def model_card(folder: str, name: str, run: Any, tags: Mapping[str, str]) -> str:
    """Markdown for the README.md of a version.

    Args:
        folder: the model's folder, for its config.json.
        name: registered name.
        run: MLflow's entity of the run that trained it.
        tags: of the version, listed one a line.
    """
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as stream:
        config = json.load(stream)
    labels = config.get("id2label") or {}
    return _TEXT.format(
        name=name,
        backbone=config.get("backbone") or "backbone in config.json",
        queries=config.get("num_queries", "?"),
        classes=", ".join(str(labels[key]) for key in sorted(labels, key=int)) or "not named",
        run_id=run.info.run_id,
        run_name=run.info.run_name,
        revision=run.data.tags.get(GIT_TAG, "not known"),
        tags="".join(f"- {key}: {value}\n" for key, value in sorted(tags.items())),
    )
