"""Models over data sets and folders of images."""
