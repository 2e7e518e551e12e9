"""Create an empty MLflow database in a millisecond by copying a template; MLflow itself takes two seconds."""

import functools
import shutil
import tempfile
from pathlib import Path

from raydetr.registry.tracking import client, resolve_uri


def empty_registry(folder: Path, name: str = "mlflow.db") -> str:
    """Return the tracking URI of the database `folder/name`; create it if it does not exist."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        shutil.copy(_template(), file)
    return resolve_uri(f"sqlite:///{file}")


@functools.cache
def _template() -> Path:
    """Create the database to copy, once per test process."""
    file = Path(tempfile.mkdtemp(prefix="mlflow-")) / "mlflow.db"
    client(resolve_uri(f"sqlite:///{file}"))
    return file
