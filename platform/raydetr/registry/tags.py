"""Tags of a model version that say which data made it."""

TRAINED_ON_TAG = "data_digest"
"""Digest of the training data."""
CHOSEN_ON_TAG = "chosen_on_digest"
"""Digest of the validation data that selected the checkpoint or ended the training."""
