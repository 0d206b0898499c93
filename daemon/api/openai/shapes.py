"""How answers look to OpenAI's clients: chats, completions and embeddings, whole and in chunks. Pure.

One field more than OpenAI has: `answered_by`, the node that answered.
"""

from __future__ import annotations

import array
import base64
import codecs
import json
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal

from daemon.api import views
from daemon.api.services import Answer, Embedded
from daemon.engine.interface import Candidate, Delta, FinishReason, TokenLogprob, ToolCallDelta, Usage
from registry.codes import short

Json = dict[str, Any]
Kind = Literal["chat.completion", "chat.completion.chunk", "text_completion"]

_PREFIXES: Final[Mapping[Kind, str]] = {"chat.completion": "chatcmpl-", "chat.completion.chunk": "chatcmpl-", "text_completion": "cmpl-"}


class Head:
    """What all chunks of an answer, or the whole of it, begin with. `created` is in unix seconds."""

    def __init__(self, kind: Kind, created: int) -> None:
        self._same = {"id": _PREFIXES[kind] + secrets.token_hex(12), "object": kind, "created": created}

    def __call__(self, answer: Answer, choices: Sequence[Json], **more: Any) -> Json:
        return {**self._same, "model": short(answer.code), "answered_by": answer.answered_by, "choices": list(choices), **more}


def usage(used: Usage) -> Json:
    return {**views.usage(used), "prompt_tokens_details": {"cached_tokens": used.cached_tokens}}


# -- chats --------------------------------------------------------------------------------------------------------------


class ChatChoice:
    """One choice of a chat, from its deltas. With `logprobs` these were asked for, and come even where there are none."""

    def __init__(self, index: int, *, logprobs: bool) -> None:
        self._index = index
        self._with_logprobs = logprobs
        self._begun = False
        self._texts: list[str] = []
        self._calls: dict[int, Json] = {}
        self._arguments: dict[int, list[str]] = {}
        self._logprobs: list[Json] = []
        self._finish: FinishReason | None = None

    def add(self, delta: Delta) -> None:
        """Take a piece for `whole`."""
        self._texts.append(delta.text)
        for piece in delta.tool_calls:
            empty = {"id": piece.id, "type": "function", "function": {"name": piece.name, "arguments": ""}}
            self._calls.setdefault(piece.index, empty)
            self._arguments.setdefault(piece.index, []).append(piece.arguments)
        self._logprobs += map(_token, delta.logprobs)
        self._finish = delta.finish or self._finish

    def whole(self) -> Json:
        text = "".join(self._texts)
        message: Json = {"role": "assistant", "content": text if text or not self._calls else None, "refusal": None}
        if self._calls:
            for index, call in self._calls.items():
                call["function"]["arguments"] = "".join(self._arguments[index])
            message["tool_calls"] = [call for _, call in sorted(self._calls.items())]
        return {"index": self._index, "message": message, "logprobs": self._said(self._logprobs), "finish_reason": self._finish}

    def chunks(self, delta: Delta) -> Iterator[Json]:
        """A piece as the choices of chunks: what it says, then how the answer ended."""
        if delta.text or delta.tool_calls or delta.logprobs:
            said: Json = {"content": delta.text} if delta.text or not delta.tool_calls else {}
            if delta.tool_calls:
                said |= {} if self._begun or delta.text else {"content": None}
                said["tool_calls"] = [_call_piece(piece) for piece in delta.tool_calls]
            yield self._chunk(said, None, [_token(token) for token in delta.logprobs])
        if delta.finish is not None:
            yield self._chunk({}, delta.finish, [])

    def _chunk(self, said: Json, finish: FinishReason | None, logprobs: list[Json]) -> Json:
        if not self._begun:
            self._begun = True
            said = {"role": "assistant", **({"content": ""} if finish else {}), **said}
        shown = self._said(logprobs) if logprobs else None
        return {"index": self._index, "delta": said, "logprobs": shown, "finish_reason": finish}

    def _said(self, logprobs: list[Json]) -> Json | None:
        return {"content": logprobs, "refusal": None} if self._with_logprobs else None


def _call_piece(piece: ToolCallDelta) -> Json:
    if piece.id is None and piece.name is None:
        return {"index": piece.index, "function": {"arguments": piece.arguments}}
    return {"index": piece.index, "id": piece.id, "type": "function", "function": {"name": piece.name, "arguments": piece.arguments}}


def _token(token: TokenLogprob) -> Json:
    return {**_candidate(token.drawn), "top_logprobs": [_candidate(one) for one in token.likeliest]}


def _candidate(one: Candidate) -> Json:
    return {"token": one.bytes.decode("utf-8", "replace"), "bytes": list(one.bytes), "logprob": one.logprob}


# -- completions --------------------------------------------------------------------------------------------------------


class TextChoice:
    """One choice of a completion, from its deltas. `echo` goes before its text; `logprobs` is as it was asked for."""

    def __init__(self, index: int, *, echo: str, logprobs: int | None) -> None:
        self._index = index
        self._echo = echo
        self._top = logprobs
        self._texts: list[str] = []
        self._tokens: list[TokenLogprob] = []
        self._finish: FinishReason | None = None
        # Tokens may end within a character: an offset counts the characters that were whole before the token.
        self._offset = len(echo)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, delta: Delta) -> None:
        """Take a piece for `whole`."""
        self._texts.append(delta.text)
        self._tokens += delta.logprobs
        self._finish = delta.finish or self._finish

    def whole(self) -> Json:
        return self._choice(self._echo + "".join(self._texts), self._tokens, self._finish)

    def chunks(self, delta: Delta) -> Iterator[Json]:
        """A piece as the choices of chunks: what it says, then how the answer ended."""
        echo, self._echo = self._echo, ""
        if echo:
            yield self._choice(echo, [], None)
        if delta.text or delta.logprobs:
            yield self._choice(delta.text, delta.logprobs, None)
        if delta.finish is not None:
            yield self._choice("", [], delta.finish)

    def _choice(self, text: str, tokens: Sequence[TokenLogprob], finish: FinishReason | None) -> Json:
        shown = None if self._top is None else self._logprobs(tokens)
        return {"text": text, "index": self._index, "logprobs": shown, "finish_reason": finish}

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> Json:
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(token.drawn.bytes))
        return {
            "tokens": [_name(token.drawn) for token in tokens],
            "token_logprobs": [token.drawn.logprob for token in tokens],
            "top_logprobs": [{_name(one): one.logprob for one in token.likeliest} for token in tokens] if self._top else None,
            "text_offset": offsets,
        }


def _name(one: Candidate) -> str:
    """A token as text; one that is a part of a character as OpenAI writes it, `bytes:\\xe2\\x80`."""
    try:
        return one.bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in one.bytes)


# -- embeddings ---------------------------------------------------------------------------------------------------------


def embeddings(found: Embedded, encoding: Literal["float", "base64"]) -> Iterator[bytes]:
    """The JSON of all vectors in pieces, since making it at once would hold up everything else."""
    yield b'{"object":"list","data":['
    for index, vector in enumerate(found.embeddings.vectors):
        shown = base64.b64encode(vector).decode("ascii") if encoding == "base64" else _floats(vector)
        entry = {"object": "embedding", "index": index, "embedding": shown}
        yield (b"," if index else b"") + json.dumps(entry, separators=(",", ":")).encode()
    tokens = found.embeddings.prompt_tokens
    told = {"model": short(found.code), "answered_by": found.answered_by, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
    yield b"]," + json.dumps(told, separators=(",", ":")).encode()[1:]


def _floats(vector: bytes) -> list[float]:
    found = array.array("f", vector)
    if sys.byteorder == "big":
        found.byteswap()
    return found.tolist()
