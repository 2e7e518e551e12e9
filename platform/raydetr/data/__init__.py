"""Data in: COCO to shards, the order in which records are used, and the stream that feeds the workers."""
