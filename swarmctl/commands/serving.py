"""Serving models."""

from __future__ import annotations

import os
import re
from typing import Any

import click

from swarmctl.context import Command, Context, pass_context
from swarmctl.failure import USAGE, Failure

_UNITS = {"s": 1, "m": 60, "h": 3600, "": 1}


class Duration(click.ParamType[float]):
    """Seconds, as `30s`, `10m`, `1h` or a bare number; `always` and -1 are for ever."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if value in ("always", "-1"):
            return -1.0
        found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)([smh]?)", str(value))
        if found is None:
            self.fail(f"{value!r} is no time; use 30s, 10m, 1h, 0 or always", param, ctx)
        return float(found[1]) * _UNITS[found[2]]


@click.command(cls=Command)
@click.argument("ref", required=False)
@click.option("--context", "context_size", type=click.IntRange(min=64), metavar="TOKENS", help="KV cache, shared by its chats.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of llama.cpp.")
@click.option("--gpu-layers", type=click.IntRange(min=-1), help="Layers to put on a GPU; -1: all, or none if they do not fit.")
@click.option("--slots", type=click.IntRange(min=1), help="Chats answered at the same time.")
@click.option("--batch", type=click.IntRange(min=1), metavar="TOKENS", help="Tokens that are read at once.")
@click.option("--keep-alive", type=Duration(), help="How long it stays loaded when nobody asks: 30s, 10m, 1h, 0 or always.")
@click.option("--upstream", metavar="URL", help="Answer with a model of the OpenAI-compatible server at URL instead.")
@click.option("--model", metavar="NAME", help="What the upstream calls the model.")
@click.option("--key-env", metavar="VARIABLE", help="The environment variable that holds the upstream's key.")
@pass_context
def serve(
    context: Context,
    ref: str | None,
    context_size: int | None,
    threads: int | None,
    gpu_layers: int | None,
    slots: int | None,
    batch: int | None,
    keep_alive: float | None,
    upstream: str | None,
    model: str | None,
    key_env: str | None,
) -> None:
    """Load a local model and answer whoever asks for it, until `stop`. REF is its code, CID or name.

    Serving it again changes the options that are given. With --upstream there is no REF: another server answers.
    """
    from swarmctl.client import LONG_S
    from swarmctl.render import safe

    body = {
        "modelId": ref,
        "contextSize": context_size,
        "threads": threads,
        "gpuLayers": gpu_layers,
        "slots": slots,
        "batch": batch,
        "keepAlive": keep_alive,
        "upstream": _upstream(ref, upstream, model, key_env),
    }
    found = context.client().post("/api/ai/serve", body, timeout=LONG_S)
    limits = f"{found['context']} tokens, {found['slots']} chats at once" if ref else f"from another server, {found['slots']} at once"
    context.show(found, lambda: f"serving #{found['code']} {safe(found['name'])}: {limits}")


def _upstream(ref: str | None, url: str | None, model: str | None, key_env: str | None) -> dict[str, str] | None:
    """The other server's part of the request. Its key is read here, of the one variable that was named."""
    if (ref is None) == (url is None):
        raise Failure(USAGE, "serve: needs either REF or --upstream", "swarmctl ls lists what is here")
    if (url is None) != (model is None) or (url is None and key_env is not None):
        raise Failure(USAGE, "serve: --upstream and --model go together, --key-env with both", "swarmctl serve --help")
    if url is None or model is None:
        return None
    if key_env is None:
        return {"url": url, "model": model}
    key = os.environ.get(key_env, "").strip()
    if not key:
        raise Failure(USAGE, f"{key_env}: no such variable is set, or it is empty", "export it, and name it with --key-env")
    return {"url": url, "model": model, "key": key}


@click.command(cls=Command)
@click.argument("ref")
@pass_context
def stop(context: Context, ref: str) -> None:
    """Stop serving a model and give its memory back. It stays on this machine and is still seeded."""
    from swarmctl.render import safe

    found = context.client().delete("/api/ai/serve", {"modelId": ref})
    context.show(found, lambda: f"#{found['code']} {safe(found['name'])} is not served any more")
