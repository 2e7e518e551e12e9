"""The Python client of the endpoint."""
