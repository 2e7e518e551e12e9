"""Tags of a model version with the digests of the data that it was trained and selected on."""

TRAINED_ON_TAG = "data_digest"
"""Digest of the training data."""
CHOSEN_ON_TAG = "chosen_on_digest"
"""Digest of the validation data that selected the checkpoint or stopped training early."""
