"""Errors as OpenAI's clients expect them: a status, and a body with message, type, param and code.

| status | meaning |
|---|---|
| 400 | a value that is wrong or not supported; code context_length_exceeded if a prompt is too long |
| 401 | no API key, or a wrong one |
| 404, 405 | an unknown model or address; another method |
| 413 | a body that is too large |
| 429 | the queue is full |
| 499 | the client left; nobody reads it, but it is in the log |
| 500, 503 | a fault of the server or the model; the server is ending |
"""

from minillm.errors import UserError
from minillm.serving.api.schema import FIELD_NAMES
from minillm.serving.request import QueueFullError

CLIENT_LEFT = 499
RETRY_AFTER_S = 1  # an answer of a small model takes about that long
TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer to a request that cannot be served.

    Args:
        param: the field at fault, such as ``messages.0.content``.
        code: OpenAI's word for this error, if programs should recognise it.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers that go with the status."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": str(RETRY_AFTER_S)} if self.status in (429, 503) else {}

    @property
    def body(self) -> dict:
        """Return the body; a text without a UTF-8 form (a lone surrogate) is written with escapes."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": {key: _printable(value) for key, value in error.items()}}


def as_api_error(error: Exception) -> ApiError:
    """Return the answer to a request that ``error`` has ended."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full")
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    return ApiError(500, "the server has failed; its log says why", code="internal_error")


def from_validation(errors: list[dict]) -> ApiError:
    """Return the answer to a body that is not JSON, or whose fields have wrong types; ``errors`` are pydantic's."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if tuple(first["loc"]) == ("body",):
        return ApiError(400, "the body must be a JSON object, sent with the header Content-Type: application/json")
    # Behind "body" there are fields and indices, and in a union the names of types.
    place = [part for part in first["loc"][1:] if isinstance(part, int) or part in FIELD_NAMES]
    param = ".".join(map(str, place))
    more = f" ({len(errors) - 1} more)" if len(errors) > 1 else ""
    message = first["msg"] if first["type"] != "missing" else "this field is required"
    return ApiError(400, f"{param}: {message}{more}", param=param)


def _printable(value: str | None) -> str | None:
    return value if value is None else value.encode("utf-8", "backslashreplace").decode("utf-8")
