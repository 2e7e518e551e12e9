import pytest

from raydetr.serving.ingress import new_api
from tests.raydetr.serving.guarded_app import ask, message_of

API = new_api()
"""Without a service: rejected requests never reach it."""
PATHS = [
    (method.upper(), path.replace("{name}", "raydetr"))
    for path, operations in API.openapi()["paths"].items()
    for method in operations
]


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_no_route_ignores_an_unknown_parameter(method, path):
    answer = ask(API, method, f"{path}?nothing-like-it=1")
    assert answer.status_code == 422
    assert "There is no query parameter 'nothing-like-it'" in message_of(answer)


@pytest.mark.parametrize(
    ("path", "query", "message"),
    [
        ("/v1/detect", "class=cat", "'class': the nearest is 'classes'"),
        ("/v1/detect", "clases=cat", "'clases': the nearest is 'classes'"),
        ("/v1/detect", "topk=3", "'topk': the nearest is 'top_k'"),
        ("/v1/detect", "Threshold=0.3", "'Threshold': the nearest is 'threshold'"),
        ("/v1/detect", "kind=instance", "'kind': this route has threshold, top_k, classes, orientation"),
        ("/v1/segment", "fromat=png", "'fromat': the nearest is 'format'"),
        ("/v1/segment", "=1", "'': this route has"),
        ("/v1/detect", "threshold=0.1&threshold=0.9", "'threshold' is given 2 times: give it once"),
        ("/v1/segment", "kind=instance&kind=panoptic", "'kind' is given 2 times"),
        ("/health", "verbose=1", "'verbose': this route has none"),
        ("/v1/detect", "x" * 5000 + "=1", "'xxxxxxxx"),
    ],
)
def test_an_invalid_query_is_rejected_with_the_nearest_name(path, query, message):
    answer = ask(API, "POST" if path.startswith("/v1/") else "GET", f"{path}?{query}")
    assert answer.status_code == 422
    assert message in message_of(answer)
    assert len(answer.content) < 300


def test_a_list_may_be_repeated_and_the_page_accepts_any_query():
    with pytest.raises(AttributeError, match="service"):  # the query check has passed
        ask(API, "POST", "/v1/detect?classes=a&classes=b&threshold=0.5&orientation=apply")
    assert ask(API, "GET", "/?utm_source=mail").status_code == 200
