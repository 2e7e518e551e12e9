"""Reject unknown and repeated query parameters. Ignoring them would give a wrong answer that looks right."""

from collections import Counter
from difflib import get_close_matches
from typing import Any

from fastapi import Request

from raydetr.errors import RequestError

_MAX_NAME_CHARS = 40


async def check_query(request: Request) -> None:
    """Check the names in a request's query against the parameters of its route in the OpenAPI document.

    A route that is not in the document, such as the demo page, accepts any query.

    Raises:
        RequestError: 422 for an unknown name, with the nearest known one, and for a repeated parameter that is not a
            list.
    """
    given = Counter(name for name, _ in request.query_params.multi_items())
    path = request.app.openapi()["paths"].get(request.scope["route"].path_format)
    if not given or path is None:
        return
    parameters = path[request.method.lower()].get("parameters", [])
    repeatable = {each["name"]: _is_list(each["schema"]) for each in parameters if each["in"] == "query"}
    for name, count in given.items():
        shown = repr(name[:_MAX_NAME_CHARS])
        if name not in repeatable:
            raise RequestError(
                422, f"There is no query parameter {shown}: {_suggest(name, list(repeatable))}."
            )
        if count > 1 and not repeatable[name]:
            raise RequestError(422, f"The query parameter {shown} is given {count} times: give it once.")


def _suggest(name: str, known: list[str]) -> str:
    if not known:
        return "this route has none"
    near = get_close_matches(name[:_MAX_NAME_CHARS].lower(), known, 1, 0.5)
    return f"the nearest is {near[0]!r}" if near else f"this route has {', '.join(known)}"


def _is_list(schema: dict[str, Any]) -> bool:
    return any(each.get("type") == "array" for each in (schema, *schema.get("anyOf", ())))
