"""From shards to batches: the plan of an epoch, and the Ray Data execution that follows it."""
