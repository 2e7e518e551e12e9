"""Additions to the model that exist only in training: query groups and dense supervision."""
