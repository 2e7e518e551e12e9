"""Scoring a model on shards: predictions (`predict`), figures (`score`), what is kept of them (`record`)."""
