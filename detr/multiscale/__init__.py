"""The opt-in multi-scale architecture of `DetrConfig.multi_scale`; `detr.multiscale.detector` has the whole network."""
