"""Fine-tune a detector on a COCO folder, in plain PyTorch.

python examples/fine_tune.py MODEL ANNOTATIONS IMAGES OUTPUT [STEPS]
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import torch
from PIL import Image

from detr import DetrForObjectDetection, DetrImageProcessor

source, annotations, images, output, *steps = sys.argv[1:]
coco = json.loads(Path(annotations).read_text())
label_of = {category["id"]: label for label, category in enumerate(coco["categories"])}
objects = defaultdict(list)
for each in coco["annotations"]:
    objects[each["image_id"]].append({**each, "category_id": label_of[each["category_id"]]})

processor = DetrImageProcessor.from_pretrained(source)
id2label = {label: category["name"] for label, category in enumerate(coco["categories"])}
model = DetrForObjectDetection.from_pretrained(source, id2label=id2label).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-4)
for step in range(int(steps[0]) if steps else 300):
    records = [coco["images"][i] for i in torch.randint(len(coco["images"]), (2,))]
    photos = [Image.open(Path(images, record["file_name"])).convert("RGB") for record in records]
    targets = [{"image_id": record["id"], "annotations": objects[record["id"]]} for record in records]
    loss = model(**processor(photos, targets, return_tensors="pt")).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}", flush=True)
model.save_pretrained(output)
processor.save_pretrained(output)
