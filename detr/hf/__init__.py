"""The helpers of the transformers page around the models: `pipeline()` and the Auto classes."""
