"""The node itself: its daemon, how it is, and whom it knows."""

from __future__ import annotations

import os
import shlex
import sys

import click

from swarmctl.context import Command, Context, pass_context
from swarmctl.failure import IN_THE_WAY, USAGE, Failure

_SETTINGS = {"ignore_unknown_options": True}


def _only_ours(context: Context) -> None:
    """A daemon elsewhere is not ours to start or stop, and the one of the default data folder is not the one that is meant."""
    if context.elsewhere is not None:
        raise Failure(USAGE, "SWARMCTL_API: it points at a daemon elsewhere", "unset it, or name a data folder with --home")


@click.command(cls=Command, context_settings=_SETTINGS, options_metavar="[OPTIONS] [--SETTING VALUE]...")
@click.argument("settings", nargs=-1, type=click.UNPROCESSED, metavar="")
@pass_context
def daemon(context: Context, settings: tuple[str, ...]) -> None:
    """Run the daemon in the foreground. Every setting is a flag: --api-port 0, --network loopback."""
    from swarmctl import launch

    sys.stdout.flush()
    command = launch.command(context.home, (*settings, "--json") if context.json else settings)
    os.execve(command[0], command, launch.environment())


@click.command(cls=Command, context_settings=_SETTINGS, options_metavar="[OPTIONS] [--SETTING VALUE]...")
@click.argument("settings", nargs=-1, type=click.UNPROCESSED, metavar="")
@pass_context
def up(context: Context, settings: tuple[str, ...]) -> None:
    """Start the daemon in the background. Every setting is a flag, as for `daemon`."""
    from swarmctl import launch
    from swarmctl.client import Client

    _only_ours(context)
    found, started = launch.ensure(context.home, settings, context.say)
    if not started and settings:
        context.say("the daemon is running already, so these settings were not applied; swarmctl down first")
    document = Client(found.url, launch.token(context.home)).get("/api/status")
    context.show(document, lambda: f"the daemon {'is ready' if started else 'is running already'} at {found.url} (process {found.pid})")


@click.command(cls=Command)
@pass_context
def down(context: Context) -> None:
    """Stop the daemon and wait until it is gone. Nothing running is no error."""
    from swarmctl import launch

    _only_ours(context)
    pid = launch.stop(context.home)
    told = "no daemon is running" if pid is None else f"the daemon has stopped (process {pid})"
    context.show({"state": "stopped", "pid": pid}, lambda: told)


@click.command(cls=Command)
@pass_context
def status(context: Context) -> None:
    """How the node is, and its address for `join`. Does not start the daemon: exit code 7 when it is not running."""
    from swarmctl import launch, network, render
    from swarmctl.client import Client

    url = context.elsewhere
    if url is None:
        found = launch.find(context.home)
        if found is None:
            raise Failure(IN_THE_WAY, "daemon: it is not running", "swarmctl up starts it")
        url = found.url
    document = Client(url, launch.token(context.home)).get("/api/status")
    context.show(document, lambda: render.status(document, network.lines(document)))


@click.command(cls=Command)
@click.argument("address")
@pass_context
def join(context: Context, address: str) -> None:
    """Make this node and another know each other. ADDRESS is from the other node's `swarmctl status`."""
    from swarmctl import render

    peer = context.client().post("/api/swarm/join", {"address": address})
    context.show(peer, lambda: f"joined node {render.short_key(peer['node'])}, which has {peer['models']} models")


@click.command(cls=Command)
@pass_context
def peers(context: Context) -> None:
    """The other nodes that are known now."""
    from swarmctl import render

    found = context.client().get("/api/swarm/peers")
    context.show(found, lambda: render.peers(found))


@click.command(cls=Command)
@pass_context
def key(context: Context) -> None:
    """The public key that signs what this node publishes and announces."""
    node = context.client().get("/api/status")["node"]
    context.show({"node": node}, lambda: str(node))


@click.command(cls=Command)
@pass_context
def env(context: Context) -> None:
    """Two variables for a shell, so that any OpenAI client uses this node: eval "$(swarmctl env)"."""
    client = context.client()
    variables = {"OPENAI_BASE_URL": f"{client.url}/v1", "OPENAI_API_KEY": client.token}
    context.show(variables, lambda: "\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items()))


@click.command(cls=Command)
@pass_context
def version(context: Context) -> None:
    """The version of this command."""
    from importlib import metadata

    try:
        found = metadata.version("swarmctl")
    except metadata.PackageNotFoundError:
        raise Failure(IN_THE_WAY, "version: swarmctl is not installed", "make setup, or pip install .") from None
    context.show({"version": found}, lambda: found)
