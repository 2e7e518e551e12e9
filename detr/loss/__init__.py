"""Matching, losses and their normalizers."""
