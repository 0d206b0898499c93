"""Asking models: one question, or a conversation."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import click

from swarmctl.context import Command, Context, pass_context
from swarmctl.conversation import MAX_TEXT, Conversation
from swarmctl.failure import USAGE, Failure

_MARKED_CODE = re.compile(r"#[A-Za-z2-7]{7,52}")
_via = click.option(
    "--via",
    default="auto",
    metavar="auto|never|NODE",
    help="The way of the answer: a relay where nothing else works, none, or this node alone.",
)


@click.command(cls=Command)
@click.argument("words", nargs=-1, metavar="[PROMPT] [#CODE]")
@click.option("--max-tokens", type=click.IntRange(min=1), help="End the answer after so many tokens.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="0 always takes the likeliest token.")
@click.option("--system", help="Instructions that go before the prompt.")
@_via
@pass_context
def ask(
    context: Context,
    words: tuple[str, ...],
    max_tokens: int | None,
    temperature: float | None,
    system: str | None,
    via: str,
) -> None:
    """Ask a model of the swarm; the answer alone goes to stdout.

    Without a PROMPT, or when it is -, the prompt is read from standard input. Without a CODE, one that is served is chosen.
    A shell takes an unquoted # for a comment: leave it out, or quote it.
    """
    from swarmctl.answers import stream, who

    prompt, code = split(words)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": _from_stdin() if prompt in (None, "-") else prompt})
    limits = {"maxTokens": max_tokens, "temperature": temperature, "via": via}
    body = {"modelId": code, "messages": messages, **limits, "stream": True}
    answer: dict[str, Any] = {}
    stream(context.client(), body, answer, lambda: context.say(who(answer)), shown=not context.json)
    if context.json:
        context.show(answer, lambda: "")


def split(words: tuple[str, ...]) -> tuple[str | None, str | None]:
    """Prompt and code of what was typed. A word like `#abc2def` is the code wherever it stands; else the second is."""
    if len(words) > 2:
        raise Failure(USAGE, "ask: more than a prompt and a code", "put the prompt in quotes")
    marked = [word for word in words if _MARKED_CODE.fullmatch(word)]
    if len(marked) == 2:
        raise Failure(USAGE, "ask: two codes and no prompt", "put the prompt first: swarmctl ask 'PROMPT' CODE")
    if marked:
        left = [word for word in words if word != marked[0]]
        return (left[0] if left else None), marked[0]
    return (words[0] if words else None), (words[1] if len(words) == 2 else None)


def _from_stdin() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise Failure(USAGE, "ask: no prompt", "give one in quotes, or pipe it in")
    try:
        text = sys.stdin.read(MAX_TEXT + 1)
    except UnicodeDecodeError:
        raise Failure(USAGE, "ask: the prompt on standard input is not text", "send UTF-8") from None
    if len(text) > MAX_TEXT:
        raise Failure(USAGE, f"ask: the prompt has more than {MAX_TEXT} characters", "send less")
    if not text.strip():
        raise Failure(USAGE, "ask: the prompt on standard input is empty", "give one in quotes, or pipe it in")
    return text


@click.command(cls=Command)
@click.argument("model", required=False, metavar="[CODE]")
@click.option("--system", metavar="TEXT", help="Instructions that go before everything.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="End each answer after so many tokens.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="0 always takes the likeliest token.")
@click.option("--resume", type=click.Path(path_type=Path, dir_okay=False), help="Go on with a conversation that /save wrote.")
@_via
@pass_context
def chat(
    context: Context,
    model: str | None,
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
    resume: Path | None,
    via: str,
) -> None:
    """Talk with a model of the swarm; /help in the conversation says what can be typed.

    CODE is a code, CID or name; without one, the model that answers first is kept. From a pipe, each line is one turn.
    """
    from swarmctl.dialogue import Dialogue, load

    conversation = load(resume) if resume is not None else Conversation()
    conversation.model = model or conversation.model
    conversation.system = system or conversation.system
    limits = {"maxTokens": max_tokens, "temperature": temperature, "via": via}
    Dialogue(context, conversation, limits, resume and resume.absolute()).run()
