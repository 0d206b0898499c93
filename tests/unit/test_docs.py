"""Every command, option and route is documented, and nothing is documented that does not exist."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from daemon.api import chat, metrics
from daemon.api.body import Fields
from daemon.api.openai import requests
from daemon.config import settings
from swarmctl.cli import MODULE_OF, cli
from tests.functional.api_server import World

DOCS = Path(__file__).parent.parent.parent / "docs"
COMMANDS = (DOCS / "commands.md").read_text(encoding="utf-8")
HTTP = (DOCS / "http.md").read_text(encoding="utf-8")


def commands() -> Iterator[tuple[str, click.Command]]:
    context = click.Context(cli)
    for name in MODULE_OF:
        command = cli.get_command(context, name)
        assert command is not None, name
        yield name, command
        if isinstance(command, click.Group):
            yield from ((f"{name} {inner}", found) for inner, found in command.commands.items())


def section(name: str) -> str:
    """The part of commands.md about a command; a command of a group is in the group's."""
    found = re.search(rf"^### `swarmctl {name.split()[0]}\b.*?(?=^##|\Z)", COMMANDS, re.MULTILINE | re.DOTALL)
    assert found is not None, f"docs/commands.md has no section on {name}"
    return found[0]


def test_every_command_and_option_is_documented() -> None:
    for name, command in commands():
        text = section(name)
        assert f"`swarmctl {name}" in text
        for parameter in command.params:
            for option in parameter.opts if isinstance(parameter, click.Option) else ():
                assert f"`{option}" in (text + COMMANDS[: COMMANDS.index("## The node")]), f"{name} {option}"
        assert command.help, name


def test_every_documented_command_and_option_exists() -> None:
    known = {name: {option for parameter in command.params for option in parameter.opts} for name, command in commands()}
    assert set(re.findall(r"^### `swarmctl (\w+)", COMMANDS, re.MULTILINE)) == {name for name in known if " " not in name}
    assert set(re.findall(r"`swarmctl (trust \w+)", COMMANDS)) == {name for name in known if " " in name}
    for name in MODULE_OF:
        options = set().union(*(found for other, found in known.items() if other.split()[0] == name))
        assert set(re.findall(r"^\| `(--[a-z-]+)", section(name), re.MULTILINE)) <= options


async def test_every_route_is_documented_and_every_documented_one_exists() -> None:
    router = World().app().router
    routes = {f"{route.method} {re.sub(':[^}]*', '', route.resource.canonical)}" for route in router.routes() if route.resource is not None}
    assert set(re.findall(r"^\| `([A-Z]+ /[^`]+)`", HTTP, re.MULTILINE)) == routes


class Recorded(Fields):
    """Notes every field that a parser looks for."""

    def __init__(self, values: dict[str, Any], within: str = "") -> None:
        super().__init__(values, within)
        self.asked: set[str] = set()

    def take(self, name: str) -> Any:
        self.asked.add(name)
        return super().take(name)


@pytest.mark.parametrize(
    ("parse", "given"),
    [
        (requests.chat, {"messages": [{"role": "user", "content": "hi"}]}),
        (requests.completion, {"prompt": "hi"}),
        (requests.embeddings, {"input": "hi"}),
        (chat.parse, {"messages": [{"role": "user", "content": "hi"}], "modelId": "m"}),
    ],
)
def test_every_field_of_a_question_is_documented(parse: Callable[[Fields], object], given: dict[str, Any]) -> None:
    fields = Recorded({"model": "m", **given} if parse is not chat.parse else given)
    parse(fields)
    assert len(fields.asked) > 4
    for name in fields.asked:
        assert re.search(rf"[`{{ ]{name}[`?,}}]", HTTP), name


def test_every_metric_is_documented() -> None:
    for name in re.findall(r'_family\("(\w+)"', Path(metrics.__file__).read_text(encoding="utf-8")):
        assert f"`{name}`" in HTTP, name


def test_every_setting_is_documented_with_its_default() -> None:
    rows = re.findall(r"^\| `([a-z._]+)` \|([^|]*)\|", (DOCS / "settings.md").read_text(encoding="utf-8"), re.MULTILINE)
    documented = {name: re.sub(r" \(.*\)", "", default).strip("` ") for name, default in rows}
    assert documented == {name: _shown(default) for name, (_, default) in settings().items()}


def _shown(default: object) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple) and default:
        return "built-in"
    return "" if default in ("", ()) else str(default)
