"""How things look in JSON: counting offers, and whom to believe about a model that is not here."""

from __future__ import annotations

from typing import Any

from daemon.api import views
from registry.records import Offer
from tests.functional.api_server import CID, CID2, MODEL, World


def offer(node: str, **more: Any) -> Offer:
    fields: dict[str, Any] = {"infohash": None, "infohash_v2": None, "manifest": None, "name": "m", "size": 1, "serving": False}
    return Offer(node=node, cid=CID2, **{**fields, **more})


async def test_one_liar_does_not_rename_a_model() -> None:
    world = World()
    offers = [offer("a", name="honest", size=5), offer("b", name="honest", size=5), offer("c", name="liar", size=9)]
    world.peers.offers = lambda: offers  # type: ignore[method-assign]
    services = world.services()
    known = next(known for known in views.swarm_models(services) if known.cid == CID2)
    entry = views.swarm_model(services, known)
    assert (entry["name"], entry["size"], entry["nodes"], entry["magnet"]) == ("honest", 5, 3, None)


async def test_what_is_served_comes_first_then_what_most_hold() -> None:
    world = World()
    services = world.services()
    assert [known.serving for known in views.swarm_models(services)] == [True, False]
    world.peers.offers = lambda: []  # type: ignore[method-assign]
    (known,) = views.swarm_models(services)
    entry = views.swarm_model(services, known)
    assert (entry["cid"], entry["nodes"], entry["local"]) == (CID, 1, True)
    assert entry["code"] == views.model(services, MODEL)["code"]


def test_times() -> None:
    assert views.iso(0) == "1970-01-01T00:00:00Z"
    assert views.seconds("1970-01-01T00:01:00Z") == 60
