"""The endpoint: `app` (HTTP), `images` (bytes to prepared image), `detector` (model), `client`."""
