"""The only package that imports private modules of Ray; tested with Ray 2.60.

Private modules may change in every release, so pyproject.toml pins Ray to the versions on which the tests pass.
"""
