"""MLflow: runs and metrics (`tracking`), model versions (`models`), evaluations of versions (`evaluations`)."""
