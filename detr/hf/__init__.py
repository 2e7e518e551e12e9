"""The loading helpers of the transformers DETR page: `pipeline()` and the Auto classes."""
