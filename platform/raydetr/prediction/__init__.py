"""Prediction over data sets and over folders of images."""
