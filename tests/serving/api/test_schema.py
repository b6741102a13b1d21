"""Requests made up from the app's own OpenAPI schema: right ones, wrong ones; none may get a 5xx."""

import os

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.serving.api.conftest import KEY

schemathesis = pytest.importorskip("schemathesis")

ASK = {"messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi"}
Mode = schemathesis.GenerationMode
FEW = settings(
    max_examples=250 if os.environ.get("MINILLM_FUZZ_EXAMPLES") else 25,
    deadline=None,
    database=None,
    derandomize="MINILLM_FUZZ_EXAMPLES" not in os.environ,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def schema(address):
    """The schema as clients get it."""
    headers = {"Authorization": f"Bearer {KEY}"}
    return schemathesis.openapi.from_url(f"{address}/openapi.json", headers=headers)


def test_the_schema_names_all_endpoints(schema):
    paths = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{name}", "/health", "/metrics"}
    assert set(schema.raw_schema["paths"]) == paths
    fields = schema.raw_schema["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "max_completion_tokens", "top_logprobs", "tools", "response_format"} <= set(fields)


@pytest.mark.parametrize("mode", [Mode.POSITIVE, Mode.NEGATIVE])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_no_request_is_an_error_of_the_server(schema, path, mode, idle):
    statuses = set()

    @FEW
    @given(
        case=schema[path]["POST"].as_strategy(generation_mode=mode),
        n_fields=st.integers(0, 6),
        question=st.sampled_from([{}, ASK]),
    )
    def check(case, n_fields, question):
        if isinstance(case.body, dict):  # with all fields at once, one of them nearly always is wrong
            required = {name: case.body[name] for name in ("messages", "prompt") if name in case.body} | question
            case.body = dict(list(case.body.items())[:n_fields]) | required
            if not isinstance(case.body.get("max_tokens"), (str, list, dict)):
                case.body["max_tokens"] = min(case.body.get("max_tokens") or 3, 3)  # saves time
        statuses.add(status_of(case))

    check()
    assert 400 in statuses
    assert mode is Mode.NEGATIVE or 200 in statuses
    idle()


@pytest.mark.parametrize("path", ["/v1/models/{name}", "/metrics"])
def test_nor_is_a_question_about_the_server(schema, path):
    @FEW
    @given(case=schema[path]["GET"].as_strategy())
    def check(case):
        status_of(case)

    check()


def status_of(case) -> int:
    """Send a request; check that its answer is right, or an error in OpenAI's form that is not the server's."""
    answer = case.call(headers={"Authorization": f"Bearer {KEY}"})
    assert answer.status_code < 500, (case.body, answer.text)
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    return answer.status_code
