"""Convert images and annotations to the tensors that DETR takes as input."""
