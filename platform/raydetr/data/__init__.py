"""The data pipeline: ingest of COCO into shards, the order of the records, and the stream that feeds the workers."""
