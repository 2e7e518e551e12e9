"""MLflow: runs with their history (`tracking`), model versions (`models`), aliases (`promote`)."""
