"""Names that MLflow takes: class names encoded as metric names, names from flags checked before anything is computed.

MLflow treats names as paths and refuses those that are not normalized. Class names are data, so they are encoded
reversibly, as OOXML does it: a character that MLflow refuses becomes `_xHEX_`, an empty path part `_x_`, and `_x` itself
`_x5F_x`. Names from flags are the user's choice, so a name that cannot work is refused.
"""

import hashlib
import posixpath
import re
from urllib.parse import quote

from raydetr.errors import ConfigError

MAX_METRIC_NAME = 250
"""Characters of a metric name."""
_MAX_FOLDER = 240
"""Bytes of a quoted experiment name: next to SQLite the experiment's artifacts are in a folder of this name."""
_MAX_MODEL, _MAX_ALIAS = 120, 100
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_ESCAPED = re.compile(r"_x([0-9A-F]*)_")


def class_metric(figure: str, class_name: str) -> str:
    """The metric of one class, such as `AP/car`; different names for different classes.

    A name over `MAX_METRIC_NAME` characters is cut and ends with a digest: it cannot be decoded.
    """
    name = f"{figure}/{'/'.join(map(_encode, class_name.split('/')))}"
    if len(name) <= MAX_METRIC_NAME:
        return name
    end = f"_h{hashlib.sha256(name.encode()).hexdigest()[:16]}_"
    # A slash or a dot at the cut would leave a path part that is not normalized.
    return name[: MAX_METRIC_NAME - len(end)].rstrip("/.") + end


def class_of_metric(metric: str) -> str:
    """The class name that `class_metric` encoded."""
    return _ESCAPED.sub(lambda found: chr(int(found[1], 16)) if found[1] else "", metric.partition("/")[2])


def require_model_name(name: str, flag: str) -> None:
    """Check the name of a registered model.

    Raises:
        ConfigError: MLflow refuses it, or `models:/NAME@ALIAS` could not name it.
    """
    if (
        not name
        or name != name.strip()
        or posixpath.normpath(name) != name
        or name == "."
        or name[:2] == ".."
    ):
        raise ConfigError(
            f"{flag} is {name!r}: it must not be empty or '.', begin with '..', or begin or end with a space."
        )
    if found := re.search(r"""[/:@'"\\`]""", name) or _CONTROL.search(name):
        raise ConfigError(
            f"{flag} is {name!r}: a name of a registered model cannot have {found[0]!r}: give letters, digits, spaces, "
            "'-', '_' and '.'."
        )
    _require_length(name, flag, _MAX_MODEL)


def require_alias(alias: str, flag: str) -> None:
    """Check the alias of a registered model.

    Raises:
        ConfigError: MLflow refuses it.
    """
    if not re.fullmatch(r"[\w-]+", alias):
        raise ConfigError(f"{flag} is {alias!r}: an alias has letters, digits, '_' and '-' only.")
    if alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", alias):
        raise ConfigError(
            f"{flag} is {alias!r}: MLflow reserves 'latest' and 'v1', 'v2', …: give another alias."
        )
    _require_length(alias, flag, _MAX_ALIAS)


def require_experiment(name: str, flag: str) -> None:
    """Check the name of an experiment.

    Raises:
        ConfigError: MLflow refuses it, or no folder for its artifacts can have it.
    """
    if not name.strip() or name in (".", "..") or _CONTROL.search(name):
        raise ConfigError(
            f"{flag} is {name!r}: give a name with letters, not '.' or '..', without control characters."
        )
    _require_length(name, flag, _MAX_FOLDER)


def _require_length(name: str, flag: str, most: int) -> None:
    length = len(quote(name, safe=""))
    if length > most:
        raise ConfigError(
            f"{flag} has {length} characters when quoted as in a URL: at most {most} are possible."
        )


def _encode(part: str) -> str:
    if not part:
        return "_x_"
    if part in (".", ".."):
        return "_x2E_" * len(part)
    text = re.sub(r"_(?=x)", "_x5F_", part)
    return re.sub(r"[^\w\-. ]", lambda found: f"_x{ord(found[0]):X}_", text)
