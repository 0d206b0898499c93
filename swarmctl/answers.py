"""An answer as it comes from the daemon: read from its stream, made harmless, and written to stdout."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

from swarmctl.client import Client
from swarmctl.failure import UNSERVED, Failure
from swarmctl.render import answer_text, safe, short_key


def stream(client: Client, body: Mapping[str, Any], answer: dict[str, Any], begun: Callable[[], None], *, shown: bool) -> None:
    """Ask, and fill `answer`: first `answered_by` `via` `code` `name` (then `begun` is called),
    `text` as it comes, its figures at the end.

    `shown`: the text goes to stdout too. Whatever ends it early, a `Failure` or Ctrl-C, `answer` has what came before.
    """
    answer.update(answered_by=None, via=None, code=None, name=None, text="")
    try:
        with closing(client.events("POST", "/api/swarm/relay/chat", body)) as events:
            for event in events:
                _take(event, answer, begun, shown)
    finally:
        if shown and answer["text"] and not answer["text"].endswith("\n"):
            _write("\n")
    if "finish_reason" not in answer:
        raise Failure(UNSERVED, "answer: it was cut off", "ask again")


def _take(event: Mapping[str, Any], answer: dict[str, Any], begun: Callable[[], None], shown: bool) -> None:
    if "error" in event:
        raise Failure.from_json(event["error"])
    if "text" in event:
        answer["text"] += event["text"]
        if shown:
            _write(answer_text(event["text"]))
        return
    answer.update(event)
    if "answered_by" in event:
        begun()


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def who(answer: Mapping[str, Any]) -> str:
    """The line that says who answers, and through whom if a relay carries it."""
    node = short_key(answer["answered_by"])
    told = f"{safe(answer['name'])} (#{safe(answer['code'])}) on node {node}"
    return f"{told}, through node {short_key(answer['via'])}" if answer["via"] else told
