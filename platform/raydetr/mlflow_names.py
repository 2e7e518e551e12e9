"""Names that MLflow accepts: encode class names as metric names, validate names from flags before a run starts.

MLflow treats names as paths and rejects those that are not normalized. Class names are data, so they are encoded
reversibly, in the way of OOXML: a character that MLflow rejects becomes `_xHEX_`, an empty path part `_x_`, and a
literal `_x` becomes `_x5F_x`. Names from flags are the user's choice, so an invalid name is an error.
"""

import hashlib
import posixpath
import re
from urllib.parse import quote

from raydetr.errors import ConfigError

MAX_METRIC_NAME = 250
"""Maximum characters of a metric name."""
_MAX_FOLDER = 240
"""Maximum bytes of a quoted experiment name: with SQLite, the experiment's artifacts are in a folder of this name."""
_MAX_MODEL, _MAX_ALIAS = 120, 100
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_ESCAPED = re.compile(r"_x([0-9A-F]*)_")


def class_metric(metric: str, class_name: str) -> str:
    """Return the metric name of a class, such as `AP/car`; different classes have different names.

    A name over `MAX_METRIC_NAME` characters is cut and ends with a digest, so it cannot be decoded.
    """
    name = f"{metric}/{'/'.join(map(_encode, class_name.split('/')))}"
    if len(name) <= MAX_METRIC_NAME:
        return name
    end = f"_h{hashlib.sha256(name.encode()).hexdigest()[:16]}_"
    # A slash or a dot at the cut would leave a path part that is not normalized.
    return name[: MAX_METRIC_NAME - len(end)].rstrip("/.") + end


def class_of_metric(metric: str) -> str:
    """Decode the class name that `class_metric` encoded."""
    return _ESCAPED.sub(lambda match: chr(int(match[1], 16)) if match[1] else "", metric.partition("/")[2])


def require_model_name(name: str, flag: str) -> None:
    """Check the name of a registered model.

    Raises:
        ConfigError: MLflow rejects it, or `models:/NAME@ALIAS` could not name it.
    """
    if (
        not name
        or name != name.strip()
        or posixpath.normpath(name) != name
        or name == "."
        or name[:2] == ".."
    ):
        raise ConfigError(
            f"{flag} is {name!r}: it must not be empty or '.', start with '..', or start or end with a space."
        )
    if invalid := re.search(r"""[/:@'"\\`]""", name) or _CONTROL.search(name):
        raise ConfigError(
            f"{flag} is {name!r}: the name of a registered model cannot contain {invalid[0]!r}: use letters, digits, "
            "spaces, '-', '_' and '.'."
        )
    _require_length(name, flag, _MAX_MODEL)


def require_alias(alias: str, flag: str) -> None:
    """Check the alias of a registered model.

    Raises:
        ConfigError: MLflow rejects it.
    """
    if not re.fullmatch(r"[\w-]+", alias):
        raise ConfigError(f"{flag} is {alias!r}: an alias may contain only letters, digits, '_' and '-'.")
    if alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", alias):
        raise ConfigError(
            f"{flag} is {alias!r}: MLflow reserves 'latest' and 'v1', 'v2', …: give another alias."
        )
    _require_length(alias, flag, _MAX_ALIAS)


def require_experiment(name: str, flag: str) -> None:
    """Check the name of an experiment.

    Raises:
        ConfigError: MLflow rejects it, or its artifact folder cannot have this name.
    """
    if not name.strip() or name in (".", "..") or _CONTROL.search(name):
        raise ConfigError(
            f"{flag} is {name!r}: it must not be blank, '.' or '..', or contain control characters."
        )
    _require_length(name, flag, _MAX_FOLDER)


def _require_length(name: str, flag: str, maximum: int) -> None:
    length = len(quote(name, safe=""))
    if length > maximum:
        raise ConfigError(
            f"{flag} has {length} characters when quoted as in a URL: the maximum is {maximum}: give a shorter name."
        )


def _encode(part: str) -> str:
    if not part:
        return "_x_"
    if part in (".", ".."):
        return "_x2E_" * len(part)
    text = re.sub(r"_(?=x)", "_x5F_", part)
    return re.sub(r"[^\w\-. ]", lambda match: f"_x{ord(match[0]):X}_", text)
