"""Errors in the shape of the API that was asked; who is let in is tested over sockets in tests/functional/test_api.py."""

from __future__ import annotations

import json

import pytest
from aiohttp.test_utils import make_mocked_request

from daemon.api.body import Fields
from daemon.api.guard import WrongHost, error_response
from daemon.errors import Busy, NotFound, SwarmError, Unauthorized, UsageError


@pytest.mark.parametrize(
    ("error", "status", "kind", "code", "param"),
    [
        (Unauthorized("token", "missing"), 401, "authentication_error", "invalid_api_key", None),
        (NotFound("model", "nobody serves it"), 404, "not_found_error", "model_not_found", None),
        (UsageError("request", "is no JSON", "docs"), 400, "invalid_request_error", None, None),
        (Fields({}, "messages[0].").wrong("role", "is missing"), 400, "invalid_request_error", None, "messages[0].role"),
        (Busy("tiny", "all slots are taken"), 429, "rate_limit_error", None, None),
        (WrongHost("Host", "wrong"), 421, "invalid_request_error", None, None),
    ],
)
def test_shapes(error: SwarmError, status: int, kind: str, code: str | None, param: str | None) -> None:
    theirs = error_response(make_mocked_request("GET", "/v1/models"), error)
    assert theirs.status == status
    assert json.loads(theirs.text or "") == {"error": {"message": str(error), "type": kind, "param": param, "code": code}}
    ours = error_response(make_mocked_request("GET", "/api/status"), error)
    assert json.loads(ours.text or "") == error.as_json()


def test_headers_that_clients_act_on() -> None:
    request = make_mocked_request("GET", "/v1/models")
    assert error_response(request, Unauthorized("token", "missing")).headers["WWW-Authenticate"] == "Bearer"
    assert error_response(request, Busy("tiny", "full")).headers["Retry-After"] == "1"
