"""Requests that schemathesis generates from the OpenAPI document, against the application."""

import base64
from collections import Counter
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode, checks

from raydetr.serving.ingress import new_api
from tests.raydetr.serving.in_process import application
from tests.raydetr.serving.test_contract import IMAGES, LIMITS, MODEL, TOKEN, boxes_only, model, tokens  # noqa: F401
from tests.tiers import rest_slow

checks.load_all_checks()
BODIES = [
    *IMAGES,
    IMAGES[0][:100],
    IMAGES[2][: len(IMAGES[2]) // 2],
    b"",
    b"text",
    IMAGES[0] + bytes(300_000),
]
RAW = ("image/jpeg", "image/png", "image/webp", "application/octet-stream")
for _type in RAW:
    schemathesis.openapi.media_type(_type, st.sampled_from(BODIES))
EXCLUDED = [checks.CHECKS.get_one("positive_data_acceptance")]
"""A schema cannot express that a string is an image, or which labels and models exist."""
READY = {"/ready": {"ready": False}, "/v2/health/ready": {"ready": False}}
"""Routes that may answer 503: on a machine that is too busy to decode one pixel in time that is correct."""
READY_EXCLUDED = [checks.CHECKS.get_one("not_a_server_error")]
REJECTIONS = ["400", "404", "405", "413", "415", "422"]
OPERATIONS = [
    (path, method) for path, each in new_api(secured=True).openapi()["paths"].items() for method in each
]
WITH_BODY = [each for each in OPERATIONS if each[1] == "post"]


@pytest.fixture(scope="module", params=rest_slow([True, False]), ids=["tokens", "no tokens"])
def api(request, model, tokens) -> FastAPI:  # noqa: F811
    return application(model, LIMITS, tokens if request.param else None)


@pytest.fixture(scope="module")
def schema(api) -> Any:
    schema = schemathesis.openapi.from_asgi("/openapi.json", api)
    # Generated credentials would only lead to 401. The check `ignored_auth` omits and falsifies the token.
    schema.config.generation.with_security_parameters = False
    schema.config.checks.negative_data_rejection.expected_statuses = REJECTIONS
    return schema


def send(case: Case) -> int:
    """Send a request with a token and run all checks on its response, except the excluded ones."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    is_ready_route = case.path in READY
    excluded = EXCLUDED + READY_EXCLUDED if is_ready_route else EXCLUDED
    # The endpoint answers within its deadline, by 504 at the latest; on a busy machine not within 10 s, the default.
    response = case.call_and_validate(
        headers=headers, excluded_checks=excluded, timeout=2 * LIMITS.deadline_s
    )
    assert len(response.headers["x-request-id"][0]) == 32
    if is_ready_route and response.status_code == 503:
        assert response.json() == READY[case.path]
    elif response.status_code >= 400 and case.method != "HEAD":
        error = response.json()["error"]
        assert error["status"] == response.status_code
        assert error["message"]
    return response.status_code


def sent(strategy: Any, examples: int) -> Counter[int]:
    """Send generated requests, the same in each run, and count the statuses."""
    statuses: Counter[int] = Counter()

    @seed(0)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy)
    def run(case: Case) -> None:
        statuses[send(case)] += 1

    run()
    return statuses


def with_known_names(case: Case) -> Case:
    """Replace the labels and the model name of a request by existing ones."""
    if "classes" in (case.query or {}):
        case.query["classes"] = ["ant", "bee"]
    if "name" in case.path_parameters:
        case.path_parameters["name"] = MODEL
    return case


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_boundary_requests_get_documented_responses(schema, path, method):
    operation = schema[path][method]
    statuses = Counter()
    for case in schema.iter_coverage_cases(
        operation, generation_modes=list(GenerationMode), generation_config=schema.config.generation
    ):
        statuses[send(case)] += 1
    assert statuses[405] >= 6  # every other method


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_generated_requests_get_documented_responses(schema, path, method):
    operation = schema[path][method]
    strategy = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    statuses = sent(strategy.map(with_known_names), 40)
    assert statuses[200] or (path in READY and statuses[503])
    if "name" in path:
        assert sent(strategy, 5)[404]


@pytest.mark.parametrize(("path", "method"), WITH_BODY)
def test_generated_invalid_requests_are_rejected(schema, path, method):
    statuses = sent(schema[path][method].as_strategy(generation_mode=GenerationMode.NEGATIVE), 40)
    assert sum(statuses[int(status)] for status in REJECTIONS) > 20


@pytest.mark.parametrize(("path", "method"), WITH_BODY)
@pytest.mark.parametrize("form", ["multipart/form-data", "application/json"])
def test_generated_multipart_and_json_bodies_are_answered(schema, path, method, form):
    image = st.sampled_from(IMAGES)
    if form == "application/json":
        image = image.map(lambda data: base64.b64encode(data).decode())
    images = st.lists(image, min_size=1, max_size=LIMITS.max_images + 1)
    operation = schema[path][method]

    def case_of(images: list[Any]) -> Case:
        return operation.Case(body={"images": images}, media_type=form)

    # 422: segmentation takes one image
    assert sent(images.map(case_of), 30).keys() == ({200, 413} if "detect" in path else {200, 413, 422})
