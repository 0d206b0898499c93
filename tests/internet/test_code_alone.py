"""Found by the code alone: a newcomer behind a symmetric NAT who knows nobody (issue 8, point 5)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.internet.scenes import (
    ANSWER,
    NO_BITTORRENT,
    NO_IPFS,
    NOBODY,
    OPEN,
    enters_at,
    multiaddr_of,
    wait_until_named,
)
from tests.internet.world import Host, World, internet
from tests.unit.gguf_files import tiny_gguf

DEADLINE_S = 120.0


@dataclass
class Codes:
    """`public` is held and served by a public host; `hidden` is served behind a symmetric NAT."""

    newcomer: Host
    public: str
    hidden: str


@pytest.fixture(scope="module")
def codes(shared_world: World, model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Codes:
    """Over BitTorrent alone. `d` is where everybody enters the DHT, `r` carries for `h`; nobody tells the newcomer of them."""
    world = shared_world
    d, r, p = world.public("D"), world.public("R"), world.public("P")
    h, newcomer = world.home("H", "symmetric"), world.home("N", "symmetric")
    d.up(*OPEN, *NO_IPFS, *NOBODY)
    entry = (*enters_at(d), *NO_IPFS)
    world.up(r, p, settings=(*OPEN, *entry))
    h.up(*entry)
    file = tiny_gguf(tmp_path_factory.mktemp("files") / "tiny.gguf", size=3 << 20)
    public = p.run("publish", str(file))["code"]
    hidden = h.run("publish", str(model_file))["code"]
    h.run("serve", hidden)
    p.join(r)
    h.join(r)
    for code in (public, hidden):
        wait_until_named(code, d)
    newcomer.up(*entry)
    return Codes(newcomer, public, hidden)


def test_a_public_holder_is_found_over_bittorrent(codes: Codes) -> None:
    pulled = codes.newcomer.run("pull", codes.public, timeout=DEADLINE_S)
    assert pulled["signed_by"]
    assert pulled["sources"]["bittorrent"] > 0


def test_one_that_nobody_can_dial_is_found_through_its_relay(codes: Codes) -> None:
    words = ("ask", "Say yes.", f"#{codes.hidden}", *ANSWER)
    answer = codes.newcomer.run(*words, timeout=DEADLINE_S)
    assert answer["via"]


def test_with_bittorrent_off_provider_records_lead_there(
    tmp_path: Path, kubo_binary: Path, model_file: Path
) -> None:
    with internet(tmp_path, kubo_binary) as world:
        r, h, n = world.public("R"), world.home("H"), world.home("N", "symmetric")
        r.up(*OPEN, *NO_BITTORRENT, *NOBODY)
        entry = ("--ipfs-bootstrap", multiaddr_of(r), *NO_BITTORRENT)
        h.up(*entry)
        h.join(r)
        code = h.run("publish", str(model_file))["code"]
        h.run("serve", code)
        n.up(*entry)
        answer = n.run("ask", "Say yes.", f"#{code}", *ANSWER, timeout=DEADLINE_S)
        assert answer["answered_by"] == h.status["node"]
