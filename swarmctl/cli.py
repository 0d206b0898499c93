"""`swarmctl`: finds the command, and is the one place where an error becomes a line and an exit code.

A command's module is imported when the command is used, so that a quick one stays quick.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from swarmctl.context import Context, Group
from swarmctl.failure import BUG, INTERRUPTED, USAGE, Failure

COMMANDS = {
    "node": ("daemon", "up", "down", "status", "join", "peers", "key", "env", "version"),
    "models": ("publish", "pull", "ls", "rm", "models", "verify", "fsck"),
    "serving": ("serve", "stop"),
    "chat": ("ask", "chat"),
    "trust": ("trust",),
    "doctor": ("doctor",),
    "privacy": ("privacy",),
}
MODULE_OF = {name: module for module, names in COMMANDS.items() for name in names}


class Commands(Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(MODULE_OF)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in MODULE_OF:
            return None
        module = importlib.import_module(f"swarmctl.commands.{MODULE_OF[cmd_name]}")
        found = getattr(module, cmd_name)
        return found if isinstance(found, click.Command) else None


@click.group(cls=Commands, invoke_without_command=True)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Share GGUF models over IPFS and BitTorrent, and let whoever serves them answer."""
    if ctx.invoked_subcommand is None:
        if ctx.ensure_object(Context).json:
            ctx.fail("Missing command.")
        click.echo(ctx.get_help())


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit with the code of the contract. Never ends in a traceback."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a letter gets its number
    context = Context()
    try:
        sys.exit(_run(words, context))
    except BrokenPipeError:
        # The reader (`| head`) has what it wanted. Python would complain once more when it flushes stdout at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _run(words: list[str], context: Context) -> int:
    try:
        # Not cli.main: it makes exit code 1, which means a bug, of a reader that has enough.
        with cli.make_context("swarmctl", words, obj=context) as ctx:
            cli.invoke(ctx)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as end:
        return end.exit_code
    except Failure as failure:
        return _fail(failure, context.json)
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "swarmctl"
        why = " ".join(error.format_message().split()).rstrip(".")
        # The line did not parse as a whole, so --json may stand behind the fault.
        wants_json = "--json" in words[: words.index("--") if "--" in words else None]
        return _fail(Failure(USAGE, f"{where}: {why}", f"see {where} --help"), context.json or wants_json)
    except (click.Abort, KeyboardInterrupt):
        return _fail(Failure(INTERRUPTED, "swarmctl: interrupted"), context.json)
    except BrokenPipeError:
        raise
    except Exception:  # a bug: the user gets one line, the log the traceback
        return _fail(Failure(BUG, "swarmctl: a bug", f"see {_log_traceback(context)}"), context.json)


def _fail(failure: Failure, as_json: bool) -> int:
    print(failure.line(), file=sys.stderr, flush=True)
    if as_json and not failure.printed:
        print(json.dumps(failure.as_json(), indent=2), flush=True)
    return failure.code


def _log_traceback(context: Context) -> str:
    import time
    import traceback

    path = context.home / "logs" / "cli.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with path.open("a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}\n{traceback.format_exc()}\n")
    except OSError:
        return f"{path}, which cannot be written"
    return str(path)


if __name__ == "__main__":
    main()
