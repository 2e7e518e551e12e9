"""Preflight checks of a training run: cluster, storage, MLflow, data, a batch, and a short overfit."""
