"""Serving models."""

from __future__ import annotations

import click

from swarmctl.context import Command, Context, pass_context


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
