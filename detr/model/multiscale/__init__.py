"""The opt-in multi-scale architecture, enabled by `DetrConfig.multi_scale`; the whole network is in `detector`."""
