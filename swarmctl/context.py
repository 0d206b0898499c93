"""What every command shares: where the daemon is, and whether people or programs read what is printed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from swarmctl.client import Client


@dataclass
class Context:
    """The options that every command takes. `home_flag` is `--home`, which wins over SWARMCTL_API and SWARMCTL_HOME."""

    json: bool = False
    home_flag: Path | None = None

    @property
    def home(self) -> Path:
        """The data folder, absolute."""
        if self.home_flag is not None:
            return self.home_flag
        if given := os.environ.get("SWARMCTL_HOME"):
            return Path(given).expanduser().absolute()
        import platformdirs  # here: most commands of a script have a home, and `version` needs none

        return Path(platformdirs.user_data_dir("swarmctl"))

    @property
    def elsewhere(self) -> str | None:
        """The URL of a daemon that is not ours to start or stop."""
        return os.environ.get("SWARMCTL_API") if self.home_flag is None else None

    def client(self) -> Client:
        """A client of the daemon, which is started if need be."""
        from swarmctl import launch
        from swarmctl.client import Client

        url = self.elsewhere
        if url is None:
            url = launch.ensure(self.home, (), self.say)[0].url
        return Client(url, launch.token(self.home))

    def say(self, text: str) -> None:
        """A line for people, on stderr; programs that asked for JSON get an object there."""
        print(json.dumps({"note": text}) if self.json else text, file=sys.stderr, flush=True)

    def show(self, document: Any, human: Callable[[], str]) -> None:
        """The result on stdout: one JSON document (ASCII, so no control character gets out), or text for people."""
        text = json.dumps(document, indent=2) if self.json else human()
        if text:
            print(text, flush=True)


def _set_json(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(Context).json = True


def _set_home(context: click.Context, _: click.Parameter, value: Path | None) -> None:
    if value is not None:
        context.ensure_object(Context).home_flag = value.expanduser().absolute()


def shared_options() -> list[click.Parameter]:
    folder = click.Path(path_type=Path, file_okay=False)
    return [
        click.Option(["--json"], is_flag=True, expose_value=False, callback=_set_json, help="One JSON document on stdout."),
        click.Option(
            ["--home"], type=folder, metavar="DIR", expose_value=False, callback=_set_home, help="The data folder (also SWARMCTL_HOME)."
        ),
    ]


class Command(click.Command):
    """A command that takes the shared options anywhere on its line."""

    def __init__(self, name: str | None, **settings: Any) -> None:
        super().__init__(name, **settings)
        self.params += shared_options()


class Group(click.Group):
    """The same for a group of commands."""

    command_class = Command

    def __init__(self, name: str | None = None, **settings: Any) -> None:
        settings.setdefault("no_args_is_help", False)  # an error is one line; --help shows the help
        super().__init__(name, **settings)
        self.params += shared_options()


pass_context = click.make_pass_decorator(Context, ensure=True)
