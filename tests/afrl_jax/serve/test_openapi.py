"""Requests made up from the service's own OpenAPI description, right and wrong ones, find no 500."""

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

STATUSES = {200, 400, 401, 404, 405, 413, 415, 422}


@pytest.fixture(scope="module")
def operations(running):
    """Every operation that the description has."""
    description = schemathesis.openapi.from_url(running[0].url + "/openapi.json")
    return [result.ok() for result in description.get_all_operations()]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_breaks_the_service(operations, mode):
    answered = set()
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and operation.method == "get":
            continue  # they take nothing, so nothing of theirs can be wrong

        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        @hypothesis.settings(
            max_examples=15,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        def ask(case):
            response = case.call()
            case.validate_response(response, checks=[not_a_server_error])
            answered.add((case.path, response.status_code))

        ask()
    assert {status for _, status in answered} <= STATUSES
    if mode is GenerationMode.POSITIVE:
        assert {path for path, status in answered if status == 200} == {operation.path for operation in operations}
