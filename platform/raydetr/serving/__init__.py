"""The endpoint, from the outside in: `middleware` and `auth`, `routes`, `bodies` and `images`, `ingress`, `detector`; `app`
puts them together, `versions` follows an alias, `client` asks.
"""
