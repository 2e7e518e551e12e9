"""Model files: loading, saving, and the parameter names of transformers 4 and 5 and of facebookresearch/detr."""
