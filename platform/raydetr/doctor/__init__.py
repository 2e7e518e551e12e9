"""What is looked at before a training run costs money: cluster, storage, MLflow, data, a batch, a short overfit."""
