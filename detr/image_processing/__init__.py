"""From images and annotations to the tensors a DETR takes."""
