"""Questions in our own field names, and the sessions that remember them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from aiohttp import web

from daemon.api import body, sse, views
from daemon.api.asking import Asking, Part, asking
from daemon.api.body import Fields
from daemon.api.messages import messages
from daemon.api.openai import models
from daemon.api.openai.requests import stop
from daemon.api.services import services
from daemon.api.sessions import MAX_TIMEOUT_S, SESSIONS, Question, Session
from daemon.api.tally import TALLY
from daemon.api.via import MAX_VIA, relay
from daemon.engine.codec import INTEGERS, NUMBERS
from daemon.engine.interface import ChatRequest, Sampling
from daemon.peerapi.ways import AUTO
from registry import codes

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """A parsed question. `model` is as it was named; None leaves the choice to the session, or to
    the routing rule. `via` is as it was written; `_asking` finds the node.
    """

    model: str | None
    session: str | None
    stream: bool
    request: ChatRequest
    via: str


async def whole_chat(request: web.Request) -> web.StreamResponse:
    asked = parse(await body.fields(request, body.CHAT))
    return web.json_response(await _whole(request, asked))


async def relay_chat(request: web.Request) -> web.StreamResponse:
    asked = parse(await body.fields(request, body.CHAT), streams=True)
    if asked.stream:
        return await sse.stream(request, _events(request, asked))
    return web.json_response(await _whole(request, asked))


def parse(fields: Fields, *, streams: bool = False) -> Asked:
    """`streams` marks the route that may choose the model and stream. Raises `UsageError`."""
    session = fields.text("sessionId")
    optional = streams or session is not None
    model = fields.text("modelId") if optional else fields.required_text("modelId")
    given: Json = {
        "max_tokens": fields.integer("maxTokens", *INTEGERS["max_tokens"]),
        "temperature": fields.number("temperature", *NUMBERS["temperature"]),
        "top_p": fields.number("topP", *NUMBERS["top_p"]),
        "seed": fields.integer("seed", *INTEGERS["seed"]),
        "stop": stop(fields),
    }
    sampling = Sampling(**{name: value for name, value in given.items() if value is not None})
    via = fields.text("via", MAX_VIA) or AUTO
    stream = streams and fields.flag("stream")
    asked = Asked(model, session, stream, ChatRequest(messages(fields), sampling), via)
    fields.done()
    return asked


async def _whole(request: web.Request, asked: Asked) -> Json:
    """One answer as a whole."""
    with _in_session(request, asked) as (wanted, question):
        async with _asking(request, wanted) as (reply, parts):
            text = "".join([delta.text async for _, delta in parts])
        if question is not None:
            question.answered(text, reply.first.answer.code)
    return {"content": text, **_end(reply), **_who(reply)}


async def _events(request: web.Request, asked: Asked) -> AsyncIterator[sse.Event]:
    """Who answers, then the text as it comes, then how it ended."""
    with _in_session(request, asked) as (wanted, question):
        said: list[str] = []
        async with _asking(request, wanted) as (reply, parts):
            async for _, delta in parts:
                if not said:
                    yield _who(reply)
                said.append(delta.text)
                if delta.text:
                    yield {"text": delta.text}
        if question is not None:
            question.answered("".join(said), reply.first.answer.code)
    yield _end(reply)


@contextmanager
def _in_session(request: web.Request, asked: Asked) -> Iterator[tuple[Asked, Question | None]]:
    """The question with what the session remembers before it. Nothing of it is kept unless it was `answered`."""
    if asked.session is None:
        yield asked, None
        return
    with request.app[SESSIONS].question(asked.session, asked.request.messages) as question:
        chat = replace(asked.request, messages=question.messages)
        yield replace(asked, model=asked.model or question.session.model, request=chat), question


def _asking(request: web.Request, asked: Asked) -> AbstractAsyncContextManager[tuple[Asking, AsyncIterator[Part]]]:
    """Raises what `via.relay` does."""
    known = services(request)
    through = relay(asked.via, known.peers.peers())
    return asking(known.answers, request.app[TALLY], asked.model, [asked.request], via=through)


def _who(reply: Asking) -> Json:
    answer = reply.first.answer
    return {
        "answered_by": answer.answered_by,
        "via": answer.via,
        "code": codes.short(answer.code),
        "name": answer.name,
    }


def _end(reply: Asking) -> Json:
    return {"finish_reason": reply.first.finish, "usage": views.usage(reply.usage()), **reply.first.figures()}


# -- sessions -----------------------------------------------------------------------------------------------------------


async def open_session(request: web.Request) -> web.StreamResponse:
    fields = await body.fields(request, body.CHAT)
    wanted, system = fields.text("modelId"), fields.text("system", body.CHAT)
    timeout = fields.number("timeout", 1, MAX_TIMEOUT_S)
    fields.done()
    known = services(request)
    model = None if wanted is None else models.resolve(models.askable(known), wanted).codes[0]
    first = [] if system is None else [{"role": "system", "content": system}]
    session = request.app[SESSIONS].create(model, first, timeout)
    return web.json_response(_session(session), status=201)


async def list_sessions(request: web.Request) -> web.StreamResponse:
    return web.json_response([_session(session, whole=False) for session in request.app[SESSIONS].all()])


async def get_session(request: web.Request) -> web.StreamResponse:
    return web.json_response(_session(request.app[SESSIONS].get(request.match_info["id"])))


async def end_session(request: web.Request) -> web.StreamResponse:
    return web.json_response(_session(request.app[SESSIONS].delete(request.match_info["id"])))


def _session(session: Session, *, whole: bool = True) -> Json:
    """In a list `messages` is their number."""
    return {
        "id": session.id,
        "modelId": None if session.model is None else codes.short(session.model),
        "created": views.iso(int(session.created)),
        "expires": views.iso(int(session.expires)),
        "messages": list(session.messages) if whole else len(session.messages),
    }
