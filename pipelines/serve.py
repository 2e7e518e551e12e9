"""Answer POST /v1/detect with a model, until Ctrl-C or SIGTERM.

On a cluster:    ray job submit -- python pipelines/serve.py --host 0.0.0.0 --num-gpus 1 --replicas 4
On one machine:  python pipelines/serve.py --model models:/raydetr@champion --port 8000
Tiny:            python pipelines/serve.py

Then: curl --data-binary @photo.jpg 'http://127.0.0.1:8000/v1/detect?threshold=0.5'
"""

import signal
import threading
from typing import Any

from raydetr.cluster import connect, require_shared
from raydetr.command import run, write_summary
from raydetr.config import ServeConfig
from raydetr.registry.models import resolve
from raydetr.registry.tracking import resolve_uri
from raydetr.serving.app import application, endpoint
from raydetr.serving.detector import Batching


def main(config: ServeConfig) -> dict[str, Any]:
    """Serve until a signal comes; the summary."""
    uri = resolve_uri(config.tracking_uri)
    model = resolve(config.model, uri)
    connect(cpus=config.replicas + 1)
    require_shared(model=uri if model.version is not None else config.model)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    batching = Batching(config.max_batch_size, config.batch_wait_s)
    app = application(model, replicas=config.replicas, num_gpus=config.num_gpus, batching=batching)
    with endpoint(app, config.host, config.port) as url:
        summary = {"model": model.address, "endpoint": url, "replicas": config.replicas}
        print(
            f"\n{model.label} is ready:\n  curl --data-binary @photo.jpg '{url}/v1/detect?threshold=0.5'",
            flush=True,
        )
        if config.json:
            write_summary(config.json, summary)
        stop.wait()
        print("\nstopping", flush=True)
    return summary


if __name__ == "__main__":
    run(main, ServeConfig)
