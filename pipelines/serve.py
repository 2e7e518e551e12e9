"""Serve a model at POST /v1/detect and /v1/segment until Ctrl-C or SIGTERM.

- On a cluster: ray job submit -- python pipelines/serve.py --device gpu --replicas 4 --host 0.0.0.0 --tokens FILE
- On one machine: python pipelines/serve.py --model models:/raydetr@champion --port 8000
- Tiny: python pipelines/serve.py

- Then: curl --data-binary @photo.jpg 'http://127.0.0.1:8000/v1/detect?threshold=0.5'
- Tokens: python pipelines/token_file.py --tokens FILE --name alice
As a service that outlives its driver: platform/deploy/serve.yaml (serve deploy), rayservice.yaml (Kubernetes).
"""

import contextlib
import threading
from typing import Any

from raydetr.cluster import connect, require_shared
from raydetr.command import Interrupted, run, write_summary
from raydetr.config import ServeConfig
from raydetr.registry.tracking import resolve_uri
from raydetr.serving.app import endpoint, from_config, require_gpus
from raydetr.serving.auth import curl_command
from raydetr.serving.proxy import set_proxy_callback


def main(config: ServeConfig) -> dict[str, Any]:
    """Serve until SIGINT or SIGTERM; return the summary."""
    model, app = from_config(config)
    set_proxy_callback()
    minimum = config.replicas + config.ingress_replicas
    connect(cpus=max(config.max_replicas + config.ingress_replicas, minimum), min_cpus=minimum)
    require_shared(model=resolve_uri(config.tracking_uri) if model.version is not None else config.model)
    require_gpus(config)
    with endpoint(app, config.host, config.port) as url:
        summary = {
            "model": model.model_uri,
            "endpoint": url,
            "device": config.device,
            "precision": config.precision,
            "engine": config.engine,
            "replicas": config.replicas,
        }
        print(
            f"\n{model.label} is ready on {config.device}:\n  {curl_command(url, config.tokens)}",
            flush=True,
        )
        if config.json:
            write_summary(config.json, summary)
        with contextlib.suppress(Interrupted):
            threading.Event().wait()
    return summary


if __name__ == "__main__":
    run(main, ServeConfig)
