"""Evaluation of a model on a data set: the job (`evaluate`), the metrics (`score`), the stored record (`record`)."""
