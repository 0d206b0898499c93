"""Serving models, and asking them."""

from __future__ import annotations

import re
import sys
from typing import Any

import click

from swarmctl.context import Command, Context, pass_context
from swarmctl.failure import UNSERVED, USAGE, Failure

MAX_PROMPT = 1024 * 1024  # characters; the daemon's ceiling for a chat is 4 MiB

_MARKED_CODE = re.compile(r"#[A-Za-z2-7]{7,52}")


@click.command(cls=Command)
@click.argument("ref")
@click.option("--context", "context_size", type=click.IntRange(min=64), metavar="TOKENS", help="KV cache, shared by its chats.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of llama.cpp.")
@click.option("--gpu-layers", type=click.IntRange(min=-1), help="Layers to put on a GPU; -1: all.")
@click.option("--slots", type=click.IntRange(min=1), help="Chats answered at the same time.")
@pass_context
def serve(context: Context, ref: str, context_size: int | None, threads: int | None, gpu_layers: int | None, slots: int | None) -> None:
    """Load a local model and answer whoever asks for it. REF is its code, CID or name."""
    from swarmctl.client import LONG_S
    from swarmctl.render import safe

    body = {"modelId": ref, "contextSize": context_size, "threads": threads, "gpuLayers": gpu_layers, "slots": slots}
    found = context.client().post("/api/ai/serve", body, timeout=LONG_S)
    limits = f"{found['context']} tokens, {found['slots']} chats at once"
    context.show(found, lambda: f"serving #{found['code']} {safe(found['name'])}: {limits}")


@click.command(cls=Command)
@click.argument("ref")
@pass_context
def stop(context: Context, ref: str) -> None:
    """Stop serving a model and give its memory back. It stays on this machine and is still seeded."""
    from swarmctl.render import safe

    found = context.client().delete("/api/ai/serve", {"modelId": ref})
    context.show(found, lambda: f"#{found['code']} {safe(found['name'])} is not served any more")


@click.command(cls=Command)
@click.argument("words", nargs=-1, metavar="[PROMPT] [#CODE]")
@click.option("--max-tokens", type=click.IntRange(min=1), help="End the answer after so many tokens.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="0 always takes the likeliest token.")
@click.option("--system", help="Instructions that go before the prompt.")
@pass_context
def ask(context: Context, words: tuple[str, ...], max_tokens: int | None, temperature: float | None, system: str | None) -> None:
    """Ask a model of the swarm; the answer alone goes to stdout.

    Without a PROMPT, or when it is -, the prompt is read from standard input. Without a CODE, one that is served is chosen.
    A shell takes an unquoted # for a comment: leave it out, or quote it.
    """
    prompt, code = split(words)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": _from_stdin() if prompt in (None, "-") else prompt})
    body = {"modelId": code, "messages": messages, "maxTokens": max_tokens, "temperature": temperature, "stream": True}
    answer = _stream(context, body)
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
        text = sys.stdin.read(MAX_PROMPT + 1)
    except UnicodeDecodeError:
        raise Failure(USAGE, "ask: the prompt on standard input is not text", "send UTF-8") from None
    if len(text) > MAX_PROMPT:
        raise Failure(USAGE, f"ask: the prompt has more than {MAX_PROMPT} characters", "send less")
    if not text.strip():
        raise Failure(USAGE, "ask: the prompt on standard input is empty", "give one in quotes, or pipe it in")
    return text


def _stream(context: Context, body: dict[str, Any]) -> dict[str, Any]:
    """Show an answer as it comes, and return it whole with its figures."""
    from swarmctl.render import answer_text, safe, short_key

    answer: dict[str, Any] = {"answered_by": None, "code": None, "name": None, "text": ""}
    for event in context.client().events("POST", "/api/swarm/relay/chat", body):
        if "error" in event:
            _end_line(context, answer["text"])
            raise Failure.from_json(event["error"])
        if "answered_by" in event:
            answer.update(event)
            context.say(f"{safe(event['name'])} (#{safe(event['code'])}) on node {short_key(event['answered_by'])}")
        elif "text" in event:
            answer["text"] += event["text"]
            if not context.json:
                sys.stdout.write(answer_text(event["text"]))
                sys.stdout.flush()
        else:
            answer.update(event)
    _end_line(context, answer["text"])
    if "finish_reason" not in answer:
        raise Failure(UNSERVED, "answer: it was cut off", "ask again")
    return answer


def _end_line(context: Context, text: str) -> None:
    if text and not text.endswith("\n") and not context.json:
        sys.stdout.write("\n")
        sys.stdout.flush()
