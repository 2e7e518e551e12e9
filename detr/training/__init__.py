"""What exists only while training: query groups and dense supervision."""
