"""Models: publish, pull, list, remove, check."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from swarmctl.context import Command, Context, pass_context
from swarmctl.failure import BUG, IN_THE_WAY, INTERRUPTED, NOT_VERIFIED, Failure

if TYPE_CHECKING:
    from swarmctl.client import Client


@click.command(cls=Command)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--name", help="What people will call it (default: the file's name).")
@click.option("--license", "license_", help="Its license, as an SPDX expression (default: what the file says).")
@click.option("--source", help="The URL that it comes from.")
@pass_context
def publish(context: Context, file: Path, name: str | None, license_: str | None, source: str | None) -> None:
    """Sign a GGUF file, seed it and give it a code to share. The file itself is never changed."""
    body = {"path": str(file.expanduser().absolute()), "name": name, "license": license_, "source": source}
    client = context.client()
    _finish(context, _watch(context, client, client.events("POST", "/api/ai/publish", body), "publish"))


@click.command(cls=Command)
@click.argument("ref")
@pass_context
def pull(context: Context, ref: str) -> None:
    """Fetch a model over IPFS and BitTorrent. REF is a code, CID, magnet or path; a broken-off pull goes on where it was."""
    client = context.client()
    transfer = client.post("/api/ai/download", {"ref": _absolute(ref)})
    _finish(context, _watch(context, client, client.events("GET", f"/api/transfers/{transfer['id']}/events"), "pull", transfer["id"]))


@click.command(cls=Command)
@pass_context
def ls(context: Context) -> None:
    """The models on this machine."""
    from swarmctl import render

    found = context.client().get("/api/ai/list")
    context.show(found, lambda: render.local_models(found))


@click.command(cls=Command)
@pass_context
def models(context: Context) -> None:
    """The models of the swarm: who has them, and who serves them."""
    from swarmctl import render

    found = context.client().get("/api/swarm/models")
    context.show(found, lambda: render.swarm_models(found))


@click.command(cls=Command)
@click.argument("ref")
@pass_context
def rm(context: Context, ref: str) -> None:
    """Stop serving and seeding a model and delete it from the store. A published original stays where it is."""
    from swarmctl.render import safe

    removed = context.client().delete("/api/ai/model", {"modelId": ref})
    context.show(removed, lambda: f"removed #{removed['code']} {safe(removed['name'])}")


@click.command(cls=Command)
@click.argument("ref")
@pass_context
def verify(context: Context, ref: str) -> None:
    """Hash a model again and check it against what it is called. Exit code 4 when it is not what it was."""
    from swarmctl.client import LONG_S
    from swarmctl.render import safe

    found = context.client().get("/api/ai/verify", {"modelId": ref}, timeout=LONG_S)
    if not found["verified"]:
        raise Failure(NOT_VERIFIED, f"{found['name']}: {found['reason']}", f"swarmctl rm {found['code']} and pull it again")
    context.show(found, lambda: f"#{found['code']} {safe(found['name'])}: every byte is right; its publisher is {safe(found['trust'])}")


@click.command(cls=Command)
@pass_context
def fsck(context: Context) -> None:
    """Hash every model again. Those that changed are no longer served or seeded; exit code 4 when there are any."""
    from swarmctl import render
    from swarmctl.client import LONG_S

    found = context.client().post("/api/fsck", timeout=LONG_S)
    context.show(found, lambda: render.local_models(found))
    bad = [model["name"] for model in found if model["state"] != "ready"]
    if bad:
        raise Failure(NOT_VERIFIED, f"{', '.join(bad)}: the bytes are no longer right", "swarmctl rm it and pull it again", printed=True)


def _absolute(ref: str) -> str:
    """A path as the daemon, which has another working folder, can find it; anything else as it is."""
    if ref.startswith(("./", "../", "~")) or ref in (".", ".."):
        return str(Path(ref).expanduser().absolute())
    return ref


def _watch(context: Context, client: Client, events: Iterator[dict[str, Any]], what: str, transfer_id: str | None = None) -> dict[str, Any]:
    """Show a transfer until it ends and return its last state. Ctrl-C cancels it."""
    from swarmctl.progress import progress

    last: dict[str, Any] = {}
    try:
        with progress(context.json) as shown:
            for event in events:
                if set(event) == {"error"}:
                    raise Failure.from_json(event["error"])
                last, transfer_id = event, event["id"]
                shown.show(event)
    except KeyboardInterrupt:
        if transfer_id is not None:
            # The daemon may be going down too; then there is nothing left to cancel.
            with contextlib.suppress(Failure):
                client.delete(f"/api/transfers/{transfer_id}")
        raise Failure(INTERRUPTED, f"{what}: interrupted", "run the same command again: it goes on where it was") from None
    return last


def _finish(context: Context, transfer: dict[str, Any]) -> None:
    """The model that a transfer brought, with where its bytes came from."""
    from swarmctl import render

    if transfer.get("error"):
        raise Failure.from_json(transfer["error"])
    if transfer.get("state") == "cancelled":
        raise Failure(INTERRUPTED, f"{transfer['ref']}: cancelled by somebody else", "run the same command again: it goes on where it was")
    if transfer.get("state") not in ("done", "failed"):
        raise Failure(IN_THE_WAY, "daemon: it went away in the middle of the transfer", "run the command again: it goes on where it was")
    if not transfer.get("model"):
        raise Failure(BUG, "daemon: the transfer ended without a model", "see logs/daemon.log in the data folder")
    document = {**transfer["model"], **{name: transfer[name] for name in ("received", "sources", "notes")}}
    context.show(document, lambda: f"{render.model(document)}\nsources    {render.by_source(transfer['sources'])}")
