"""The HTTP endpoint. From the outside in: `middleware`, `auth`, `routes`, `bodies`, `images`, `ingress`, `detector`.

`app` assembles them, `versions` follows an alias. The Python client is `raydetr.client`.
"""
