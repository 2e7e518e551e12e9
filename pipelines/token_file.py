"""Create a token for a client of the endpoint: add its hash to the token file and write or print the token.

- One machine or cluster: python pipelines/token_file.py --tokens tokens --name alice --token-file alice.token
- Tiny: python pipelines/token_file.py --tokens tokens --name alice

A running endpoint (`serve.py --tokens tokens`) accepts the token a second later. To replace a token, create another
one with the same name, give it to the client, and remove the old line.
"""

import os
from typing import Any

from raydetr.command import run
from raydetr.config import TokenFileConfig
from raydetr.errors import ConfigError
from raydetr.serving.auth import add_token


def main(config: TokenFileConfig) -> dict[str, Any]:
    """Add a token; return the summary, with the token itself if --token-file is not given."""
    if config.token_file and os.path.exists(config.token_file):
        raise ConfigError(
            f"--token-file {config.token_file} exists and may hold a token that is in use: give a new file."
        )
    token = add_token(config.tokens, config.name)
    if not config.token_file:
        return {"tokens": config.tokens, "name": config.name, "token": token}
    with open(config.token_file, "x", opener=lambda file, flags: os.open(file, flags, 0o600)) as file:
        file.write(f"{token}\n")
    return {"tokens": config.tokens, "name": config.name, "token_file": config.token_file}


if __name__ == "__main__":
    run(main, TokenFileConfig)
