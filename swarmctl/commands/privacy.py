"""`privacy`: who learns what."""

from __future__ import annotations

import click

from swarmctl.context import Command, Context, pass_context


@click.command(cls=Command)
@pass_context
def privacy(context: Context) -> None:
    """Who learns what of this node and its questions with the present settings."""
    from swarmctl import render

    found = context.client().get("/api/privacy")
    context.show(found, lambda: render.privacy(found))
