"""A minimal endpoint for comparison: FastAPI and transformers, one image per request, on all cores.

python benchmarks/serving_rival.py FOLDER PORT
"""

import io
import sys
import threading

import torch
import transformers
import uvicorn
from fastapi import Body, FastAPI
from PIL import Image

api = FastAPI()
_ONE_AT_A_TIME = threading.Lock()
"""One image on all cores at a time is faster than concurrent images that share the cores."""


@api.post("/v1/detect")
def detect(data: bytes = Body(media_type="application/octet-stream")) -> list[dict]:
    """Detect the objects in one image."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    with _ONE_AT_A_TIME, torch.inference_mode():
        inputs = api.state.processor(images=image, return_tensors="pt")
        outputs = api.state.model(**inputs)
    (detections,) = api.state.processor.post_process_object_detection(
        outputs, threshold=0.5, target_sizes=[(image.height, image.width)]
    )
    names = api.state.model.config.id2label
    return [
        {"score": score, "label": names[label], "box": box}
        for score, label, box in zip(*(detections[name].tolist() for name in ("scores", "labels", "boxes")))
    ]


if __name__ == "__main__":
    folder, port = sys.argv[1:]
    api.state.model = transformers.DetrForObjectDetection.from_pretrained(folder).eval()
    api.state.processor = transformers.DetrImageProcessor.from_pretrained(folder)
    uvicorn.run(api, host="127.0.0.1", port=int(port), log_level="warning")
