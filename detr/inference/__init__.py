"""Faster inference: `optimize()` with its engines, and `ObjectDetector`, which converts images to detections."""
