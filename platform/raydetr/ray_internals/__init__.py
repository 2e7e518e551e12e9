"""The only package that imports private modules of Ray; tested with Ray 2.60.

They may change with every version: pyproject.toml bounds Ray to those on which the tests pass.
"""
