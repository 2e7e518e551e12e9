"""Ingest: from annotations and images to checked Parquet shards."""
