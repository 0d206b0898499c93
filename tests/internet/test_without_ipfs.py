"""With IPFS off everywhere: `--via` hides asker and server from each other (issue 8, points 4 and 6)."""

from __future__ import annotations

from pathlib import Path

from tests.internet.scenes import ANSWER, NO_IPFS, OPEN
from tests.internet.world import World

# The DHT would have everybody ask everybody.
NO_DHT = ("--torrent-dht-bootstrap", "")


def test_a_named_relay_hides_asker_and_server_from_each_other(world: World, model_file: Path) -> None:
    """Also between homes that could punch a hole."""
    r, a, b = world.public("R"), world.home("A"), world.home("B")
    world.up(r, settings=(*OPEN, *NO_IPFS, *NO_DHT))
    world.up(a, b, settings=(*NO_IPFS, *NO_DHT))
    code = a.run("publish", str(model_file))["code"]
    a.run("serve", code)
    a.join(r)
    needle = b"secret question"
    with a.sniff(needle) as server, b.sniff(needle) as asker, r.sniff(needle) as carrier:
        b.join(r)
        words = ("--via", r.status["node"], *ANSWER)
        answer = b.run("ask", "A secret question.", f"#{code}", *words)
    assert answer["answered_by"] == a.status["node"]
    assert answer["via"] == r.status["node"]
    assert b.outside not in server.addresses()
    assert a.outside not in asker.addresses()
    assert carrier.between(a.outside, r.address) and carrier.between(b.outside, r.address)
    assert not server.found | asker.found | carrier.found
    assert b.fails("ask", "A question.", f"#{code}", "--via", "never").code == 5
