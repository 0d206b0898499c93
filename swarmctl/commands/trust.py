"""The operator's trust in publishers' keys."""

from __future__ import annotations

import click

from swarmctl.context import Context, Group, pass_context


@click.group(cls=Group)
def trust() -> None:
    """Publishers' keys that are trusted or blocked here."""


@trust.command("list")
@pass_context
def list_keys(context: Context) -> None:
    """The keys that are trusted or blocked."""
    from swarmctl import render

    found = context.client().get("/api/trust")
    context.show(found, lambda: render.keys(found))


@trust.command("add")
@click.argument("key")
@click.option("--name", help="Whose key it is; a model of this name signed by another key is then a mismatch.")
@pass_context
def add(context: Context, key: str, name: str | None) -> None:
    """Trust what KEY signed. KEY is `signed_by` of a model, or what `swarmctl key` prints on the publisher's node."""
    _set(context, key, "trusted", name)


@trust.command("block")
@click.argument("key")
@click.option("--name", help="Whose key it is.")
@pass_context
def block(context: Context, key: str, name: str | None) -> None:
    """Refuse what KEY signed."""
    _set(context, key, "blocked", name)


@trust.command("remove")
@click.argument("key")
@pass_context
def remove(context: Context, key: str) -> None:
    """Forget KEY: what it signed is neither trusted nor blocked."""
    found = context.client().delete("/api/trust", {"key": key})
    context.show(found, lambda: f"{found['key']} is forgotten")


def _set(context: Context, key: str, state: str, name: str | None) -> None:
    found = context.client().post("/api/trust", {"key": key, "state": state, "name": name})
    context.show(found, lambda: f"{found['key']} is {found['state']}")
