"""Annotations and images to checked Parquet shards."""
