"""Faster inference: `optimize()` and its engines, and the detector from images to detections."""
