"""Who may come in, and how every error goes out.

A request is let in when, in this order:
- it has one `Host` header, a loopback name with the port that it came in on, and asks for no other host (else 421: DNS rebinding);
- its `Origin`, if any, is this server (else 403: a web page on this machine);
- its path is not Kubo's `/api/v0/` (404: nothing of the node behind us is passed on);
- it carries the bearer token, compared in constant time (401), unless it asks for `/healthz`;
- a body has the type `application/json` and no content coding (415).

Errors leave in OpenAI's shape under /v1 and in ours elsewhere. What is not a `SwarmError` is a bug: logged, and told without details.
"""

from __future__ import annotations

import hmac
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from daemon.api.body import WrongField
from daemon.errors import Bug, NotFound, Refused, SwarmError, Unauthorized, UsageError

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")
REQUESTS = web.AppKey("requests", Counter[tuple[str, int]])  # answered requests by route, "" where there is none, and HTTP status


class NoRoute(NotFound):
    openai_type = "invalid_request_error"  # OpenAI's too; not_found_error is about models


class WrongHost(UsageError):
    http_status = 421


class WrongMethod(UsageError):
    http_status = 405


class WrongType(UsageError):
    http_status = 415


def gate(token: str) -> Any:
    """The middleware that lets a request in. `token` is the bearer token."""
    expected = token.encode()

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        _check_host(request)
        if request.path.startswith("/api/v0/") or request.path == "/api/v0":
            raise NoRoute(_shown(request.path), "no such route", "docs/http.md lists the routes")
        if request.path != "/healthz":
            _check_token(request, expected)
        _check_type(request)
        return await handler(request)

    return check


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error as its status and one JSON shape."""
    try:
        response = await handler(request)
    except SwarmError as error:
        response = error_response(request, error)
    except web.HTTPException as error:
        response = error_response(request, _translated(request, error))
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
    except ConnectionResetError:
        raise  # the client went away: aiohttp's business, and nobody is left to be told
    except Exception:  # whatever else it is, it is ours: it must not reach the caller, and must be found in the log
        log.exception("a bug while answering %s %s", request.method, _shown(request.path))
        response = error_response(request, Bug("swarmctl", "a bug", "the daemon's log says more"))
    resource = request.match_info.route.resource
    request.app[REQUESTS][resource.canonical if resource is not None else "", response.status] += 1
    return response


def error_body(request: web.BaseRequest, error: SwarmError) -> dict[str, Any]:
    """The JSON of an error in the shape of the API that was asked."""
    if not request.path.startswith("/v1/"):
        return error.as_json()
    code = error.openai_code or {401: "invalid_api_key", 404: "model_not_found"}.get(error.http_status)
    code = None if isinstance(error, NoRoute) else code
    param = error.what if isinstance(error, WrongField) else None
    return {"error": {"message": str(error), "type": error.openai_type, "param": param, "code": code}}


def error_response(request: web.BaseRequest, error: SwarmError) -> web.Response:
    response = web.json_response(error_body(request, error), status=error.http_status)
    if error.http_status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    if error.http_status == 429:
        response.headers["Retry-After"] = "1"
    if error.http_status in (408, 413, 415):
        response.force_close()  # the rest of the body is not worth reading
    return response


def _check_host(request: web.Request) -> None:
    transport = request.transport
    if transport is None:
        raise ConnectionResetError
    port = transport.get_extra_info("sockname")[1]
    allowed = {f"{name}:{port}" for name in LOOPBACK_NAMES} | (set(LOOPBACK_NAMES) if port == 80 else set())
    hosts = request.headers.getall("Host", [])
    if len(hosts) != 1 or hosts[0].lower() not in allowed:
        raise WrongHost("Host", f"this is not who was asked for: {_shown(', '.join(hosts))}", f"use 127.0.0.1:{port}")
    if request.url.raw_authority.lower() not in allowed:  # http://elsewhere/path, which counts for more than `Host` (RFC 9112, 3.2.2)
        raise WrongHost("address", f"this is no proxy to {_shown(request.url.raw_authority)}", f"use 127.0.0.1:{port}")
    for origin in request.headers.getall("Origin", []):
        if origin.lower() not in {f"http://{host}" for host in allowed}:
            raise Refused("Origin", f"web pages of {_shown(origin)} may not use this API", "use a client that is no web page")


def _check_token(request: web.Request, expected: bytes) -> None:
    given = request.headers.getall("Authorization", [])
    scheme, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    same = hmac.compare_digest(token.strip().encode("utf-8", "surrogateescape"), expected)
    if scheme.lower() != "bearer" or not same:
        raise Unauthorized("token", "missing or wrong" if given else "missing", "send the token file's content as Authorization: Bearer")


def _check_type(request: web.Request) -> None:
    if any(coding.lower() != "identity" for coding in request.headers.getall("Content-Encoding", [])):
        raise WrongType("Content-Encoding", "a coded body is not read", "send the body as it is")
    if request.body_exists and request.content_type != "application/json":
        raise WrongType("Content-Type", f"must be application/json, not {_shown(request.content_type)}", "send JSON")


def _translated(request: web.Request, error: web.HTTPException) -> SwarmError:
    where = f"{request.method} {_shown(request.path)}"
    if error.status == 404:
        return NoRoute(where, "no such route", "docs/http.md lists the routes")
    if error.status == 405:
        return WrongMethod(where, "the route does not take this method", "docs/http.md lists the routes")
    if error.status >= 500:
        return Bug(where, "failed inside the server", "the daemon's log says more")
    return UsageError(where, error.reason, "docs/http.md lists the routes")


def _shown(text: str) -> str:
    return ascii(text[:80])[1:-1]
