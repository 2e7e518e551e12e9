"""Figures that say how good predictions are."""
