"""Metrics of predictions: average precision and panoptic quality."""
