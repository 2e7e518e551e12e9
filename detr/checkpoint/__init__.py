"""Load and save model files; convert parameter names of transformers 4 and 5 and of facebookresearch/detr."""
