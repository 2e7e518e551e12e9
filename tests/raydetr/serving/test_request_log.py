import json

from raydetr.serving.images import Limits
from raydetr.serving.request_log import _print_requests_plainly
from tests.raydetr.serving.guarded_app import ask, guarded_app, log_lines


def test_request_lines_are_printed_unchanged_and_others_by_ray(capsys):
    log = log_lines()
    for _ in range(2):
        ask(guarded_app(Limits()), "GET", "/health")
    lines = log.getvalue().splitlines()
    batch = {"pid": 1, "lines": [lines[0], "a warning", lines[1]], "is_err": False}
    others = []
    _print_requests_plainly(others.append)(batch)
    _print_requests_plainly(others.append)({**batch, "lines": ["another"]})
    printed = capsys.readouterr().out.splitlines()
    assert printed == lines
    assert [json.loads(line)["route"] for line in printed] == ["/health"] * 2
    assert [each["lines"] for each in others] == [["a warning"], ["another"]]
    assert others[0]["pid"] == 1
