import pytest

from raydetr.registry.models import resolve
from tests.raydetr.serving.decoders import preparer
from tests.raydetr.serving.guarded_app import ask, log_lines
from tests.raydetr.serving.in_process import application
from tests.tiny_detr import save_tiny_detr


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    folder = save_tiny_detr(tmp_path_factory.mktemp("model") / "tiny", ["ant"], edge=64)
    assert preparer().start()
    return application(resolve(str(folder), ""))


GETS = ["/", "/health", "/ready", "/v1/models", "/v2", "/v2/health/live", "/v2/health/ready", "/openapi.json"]


@pytest.mark.parametrize("path", GETS)
def test_head_is_get_without_the_body(api, path):
    get, head = ask(api, "GET", path), ask(api, "HEAD", path)
    assert head.status_code == get.status_code == 200
    assert head.content == b""
    assert head.headers["content-length"] == get.headers["content-length"]
    assert head.headers["content-type"] == get.headers["content-type"]


@pytest.mark.parametrize("path", GETS)
def test_options_lists_the_methods_of_a_route(api, path):
    answer = ask(api, "OPTIONS", path)
    assert (answer.status_code, answer.content) == (204, b"")
    assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD", "OPTIONS"}


def test_post_routes_allow_no_head(api):
    assert ask(api, "OPTIONS", "/v1/detect").headers["allow"] == "POST, OPTIONS"
    head = ask(api, "HEAD", "/v1/detect")
    assert (head.status_code, head.content) == (405, b"")


def test_an_unknown_path_is_404_for_all_methods(api):
    assert [ask(api, method, "/nowhere").status_code for method in ("HEAD", "OPTIONS", "GET")] == [404] * 3
    answer = ask(api, "OPTIONS", "/nowhere")
    assert len(answer.content) == int(answer.headers["content-length"]) > 0


def test_other_methods_are_405(api):
    assert [ask(api, method, "/health").status_code for method in ("PUT", "DELETE", "TRACE")] == [405] * 3


def test_the_log_has_the_requested_method(api):
    log = log_lines()
    ask(api, "HEAD", "/health")
    assert '"method": "HEAD"' in log.getvalue()
    assert '"route": "/health"' in log.getvalue()
