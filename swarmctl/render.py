"""How things look to people: tables, sizes, and text of strangers made harmless. Pure, apart from asking how wide the terminal is.

Names come from other nodes and answers from models, so neither is trusted with the terminal:
- `safe` is for names and messages: control, format (bidi, zero-width), private and unassigned characters, and letters that only
  look like another script's, are shown as escapes;
- `answer_text` is for answers: no control character but newline and tab, no bidi override, no hidden tag gets through. It maps
  each character by itself, so it does not matter where an escape sequence is split between chunks.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

LONG = 4000  # characters of a text of our own daemon
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_LATIN_LIKE = ("CYRILLIC", "GREEK", "COPTIC", "ARMENIAN", "CHEROKEE", "LISU", "FULLWIDTH", "MATHEMATICAL", "LATIN SMALL LETTER SCRIPT")
# Of an answer: C0 and C1 but tab and newline, line and paragraph separators, bidi embeddings, overrides and isolates, tags, surrogates.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def safe(text: str, limit: int = 400) -> str:
    """One line of untrusted text, everything that could deceive in it shown as an escape."""
    cut = text if len(text) <= limit else text[:limit] + "..."
    if cut.isascii() and cut.isprintable():
        return cut
    return "".join(_word(word) for word in re.split(r"( )", cut))


def _word(word: str) -> str:
    mixed = any(c.isascii() and c.isalpha() for c in word)
    return "".join(_escape(c) if _deceives(c, mixed) else c for c in word)


def _deceives(character: str, beside_latin: bool) -> bool:
    if character.isascii():
        return not character.isprintable()
    category = unicodedata.category(character)
    if category in _HIDDEN or category == "Zs":
        return True
    return category.startswith("L") and beside_latin and unicodedata.name(character, "").startswith(_LATIN_LIKE)


def answer_text(chunk: str) -> str:
    """A piece of an answer as it may go to a terminal."""
    return _UNPRINTABLE.sub(lambda match: "" if match[0] == "\r" else _escape(match[0]), chunk)


def _escape(character: str) -> str:
    return character.encode("ascii", "backslashreplace").decode() if not character.isascii() else ascii(character)[1:-1]


# -- figures ------------------------------------------------------------------------------------------------------------


def size(count: float | None) -> str:
    """Bytes with a binary prefix: 98.5 MiB."""
    if count is None:
        return "?"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def short_key(key: str | None) -> str:
    """The first 8 digits of a node's or publisher's key."""
    return safe((key or "").removeprefix("ed25519:")[:8]) or "-"


def short_keys(keys: Sequence[str]) -> str:
    return " ".join(map(short_key, keys)) or "-"


def yes(value: object) -> str:
    return "yes" if value else "-"


def by_source(sources: Mapping[str, int]) -> str:
    return ", ".join(f"{size(amount)} by {safe(source)}" for source, amount in sources.items() if amount) or "nothing"


def from_now(moment: str, now: datetime | None = None) -> str:
    """An ISO 8601 time as the distance from now."""
    seconds = round((datetime.fromisoformat(moment) - (now or datetime.now(UTC))).total_seconds())
    return f"in {seconds} s" if seconds >= 0 else f"{-seconds} s ago"


# -- tables -------------------------------------------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], nothing: str) -> str:
    """Rows under headings: drawn by rich to the width of a terminal, plain columns of full length elsewhere."""
    if not rows:
        return nothing
    clean = [[safe(cell) for cell in row] for row in rows]
    return _rich(columns, clean) if sys.stdout.isatty() else _plain(columns, clean)


def _plain(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(columns), *[list(row) for row in rows]]
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def _rich(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*[Text(cell) for cell in row])  # Text: names are no markup
    console = Console()
    with console.capture() as captured:
        console.print(drawn)
    return captured.get().strip("\n")


def pairs(values: Mapping[str, str]) -> str:
    """`name  value` lines."""
    width = max(map(len, values))
    return "\n".join(f"{name:<{width}}  {safe(value, LONG)}" for name, value in values.items())


# -- things -------------------------------------------------------------------------------------------------------------


def local_models(models: Sequence[Mapping[str, Any]]) -> str:
    columns = ("code", "name", "size", "serving", "seeders", "peers", "trust", "state")
    rows = [
        (f"#{m['code']}", m["name"], size(m["size"]), yes(m["serving"]), str(m["seeders"]), str(m["peers"]), m["trust"], m["state"])
        for m in models
    ]
    return table(columns, rows, "no models here; swarmctl publish FILE or swarmctl pull REF brings one")


def swarm_models(models: Sequence[Mapping[str, Any]]) -> str:
    columns = ("code", "name", "size", "nodes", "serving", "seeders/peers", "local")
    rows = [
        (f"#{m['code']}", m["name"], _size(m), str(m["nodes"]), yes(m["serving"]), f"{m['seeders']}/{m['peers']}", yes(m["local"]))
        for m in models
    ]
    return table(columns, rows, "nobody offers a model yet; swarmctl join ADDRESS makes nodes know each other")


def askable(models: Sequence[Mapping[str, Any]], current: Callable[[Mapping[str, Any]], bool]) -> str:
    """The models that can be asked now, the `current` one marked: somebody serves them, or they are here."""
    rows = [
        ("*" if current(m) else "", f"#{m['code']}", m["name"], _size(m), str(m["nodes"]), yes(m["local"]), yes(m["serving"]))
        for m in models
        if m["serving"] or m["local"]
    ]
    return table(("", "code", "name", "size", "nodes", "local", "serving"), rows, "no model can be asked; swarmctl pull brings one")


def _size(model: Mapping[str, Any]) -> str:
    """Of a model of the swarm; those behind an upstream are no bytes."""
    return "upstream" if model["upstream"] else size(model["size"])


def peers(found: Sequence[Mapping[str, Any]]) -> str:
    """The other nodes; `relays` carry for them, `through` says how each was reached last."""
    columns = ("node", "models", "serving", "relays", "carries", "through", "expires", "peer id")
    rows = [_peer(one) for one in found]
    return table(columns, rows, "no other nodes are known; swarmctl join ADDRESS")


def _peer(found: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        short_key(found["node"]),
        str(found["models"]),
        _codes(found["serving"]),
        short_keys(found["relays"]),
        yes(found["relay"]),
        short_key(found["via"]),
        from_now(found["expires"]),
        found["peer_id"] or "-",
    )


def _codes(found: Sequence[str]) -> str:
    return " ".join(f"#{code}" for code in found) or "-"


def keys(entries: Sequence[Mapping[str, Any]]) -> str:
    return table(("key", "state", "name"), [(e["key"], e["state"], e["name"] or "-") for e in entries], "no keys are trusted or blocked")


def model(found: Mapping[str, Any]) -> str:
    """One model, as after `publish` and `pull`."""
    values = {
        "code": f"#{found['code']}",
        "name": found["name"],
        "size": size(found["size"]),
        "cid": found["cid"],
        "infohash": found["infohash"],
        "magnet": found["magnet"],
        "manifest": found["manifest"] or "-",
        "signed by": f"{found['signed_by']} ({found['trust']})" if found["signed_by"] else "nobody: unsigned",
        "path": found["path"],
    }
    return pairs(values)


def privacy(found: Sequence[Mapping[str, str]]) -> str:
    """Who learns what: a paragraph for each."""
    return "\n\n".join(_exposure(told) for told in found)


def _exposure(told: Mapping[str, str]) -> str:
    lines = [f"{safe(told['who'], LONG)}"]
    for name in ("learns", "because", "change"):
        if told[name]:
            lines.append(f"  {name:<7}  {safe(told[name], LONG)}")
    return "\n".join(lines)


def status(found: Mapping[str, Any], network: Mapping[str, str]) -> str:
    """The node and its parts; `network` is `swarmctl.network.lines` of the same."""
    ipfs, bittorrent = found["ipfs"], found["bittorrent"]
    why = f": {ipfs['reason']}" if ipfs.get("reason") else ""
    kubo = f"Kubo {ipfs['version'] or '?'}, {ipfs['peers']} peers{why}"
    sharing = (
        f"port {bittorrent['port']}, {bittorrent['torrents']} torrents, {bittorrent['peers']} peers, "
        f"down {size(bittorrent['download_rate'])}/s, up {size(bittorrent['upload_rate'])}/s"
    )
    values = {
        "state": f"{found['state']}, version {found['version']}, process {found['pid']}, since {found['started']}",
        "node": found["node"],
        "api": found["api"],
        "home": found["home"],
        **network,
        "ipfs": f"{ipfs['state']}, {kubo}" if ipfs["enabled"] else "off",
        "bittorrent": f"{bittorrent['state']}, {sharing}" if bittorrent["enabled"] else "off",
        "models": f"{found['models']}, serving {_codes(found['serving'])}",
        "transfers": str(found["transfers"]),
    }
    addresses = "\n".join(f"address     {safe(address, 9000)}" for address in found["addresses"])
    return "\n".join([pairs(values), addresses, *([engine(found["engine"])] if found["engine"] else [])])


def engine(models: Sequence[Mapping[str, Any]]) -> str:
    """The models that are served or loaded."""
    columns = ("code", "name", "state", "process", "context", "free slots", "memory", "tokens/s", "unloaded", "restarts")
    rows = [
        (
            f"#{m['code']}", m["name"], m["state"], str(m["pid"] or "-"), str(m["context"]), f"{m['free_slots']}/{m['slots']}",
            size(m["memory"]) if m["memory"] else "-", f"{m['tokens_per_second']:.1f}" if m["tokens_per_second"] else "-",
            from_now(m["expires"]) if m["expires"] else "-", f"{m['restarts']}: {m['reason']}" if m["reason"] else str(m["restarts"]),
        )
        for m in models
    ]  # fmt: skip
    return "\n" + table(columns, rows, "")
