"""The Python client of the endpoint."""

from raydetr.client.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client"]
