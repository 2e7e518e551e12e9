"""The opt-in multi-scale architecture of `DetrConfig.multi_scale`; `detr.model.multiscale.detector` has the whole network."""
