"""The networks: DETR as in the paper, and the opt-in multi-scale architecture in `detr.model.multiscale`."""
