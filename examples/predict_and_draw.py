"""Detect objects in an image and draw them with supervision (pip install supervision).

python examples/predict_and_draw.py MODEL IMAGE OUTPUT.jpg
"""

import sys

import supervision as sv
import torch
from PIL import Image

from detr import DetrForObjectDetection, DetrImageProcessor

source, file, output = sys.argv[1:]
processor = DetrImageProcessor.from_pretrained(source)
model = DetrForObjectDetection.from_pretrained(source).optimize()
image = Image.open(file).convert("RGB")
with torch.inference_mode():
    outputs = model(**processor(image, return_tensors="pt"))
sizes = [(image.height, image.width)]
(results,) = processor.post_process_object_detection(outputs, threshold=0.5, target_sizes=sizes)

found = sv.Detections.from_transformers(results, id2label=model.config.id2label)
names = [f"{name} {score:.2f}" for name, score in zip(found["class_name"], found.confidence, strict=True)]
drawn = sv.BoxAnnotator().annotate(image.copy(), found)
sv.LabelAnnotator().annotate(drawn, found, labels=names).save(output)
print(f"{len(found)} objects: {output}")
