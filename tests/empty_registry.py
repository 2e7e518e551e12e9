"""An MLflow database without runs, in a millisecond: MLflow itself takes two seconds to make one."""

import functools
import shutil
import tempfile
from pathlib import Path

from raydetr.registry.tracking import client, resolve_uri


def empty_registry(folder: Path, name: str = "mlflow.db") -> str:
    """The tracking URI of the database at `folder/name`, made where there is none."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        shutil.copy(_template(), file)
    return resolve_uri(f"sqlite:///{file}")


@functools.cache
def _template() -> Path:
    """The file that is copied, one per test process."""
    file = Path(tempfile.mkdtemp(prefix="mlflow-")) / "mlflow.db"
    client(resolve_uri(f"sqlite:///{file}"))
    return file
