"""A swarm that exists on paper: which node holds which model, and what it would say. What it says is really signed.

Models are as popular as words are frequent (Zipf); a node holds one to seven and serves one with a chance of a quarter.
"""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterable
from functools import cache, cached_property
from itertools import accumulate

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from registry import announcement as rules
from registry import sharding
from registry.cid import leaf_cid
from registry.codes import code_of_infohash_v2
from registry.envelope import key_name, sign
from registry.records import Address, Announcement, Offer, SealKey

MAIN = "/swarmctl/1/announce"
PEER_ID = "12D3KooWGRUT6XrZnJkHKn8WZ4W8JAkNNgZcZbVMkQXmxfbSjUaD"


class Population:
    """`nodes` nodes and a fifth as many models; the same for the same size."""

    def __init__(self, nodes: int) -> None:
        self.size = nodes
        self.chance = random.Random(nodes)
        self.models = max(200, nodes // 5)
        weights = list(accumulate(1 / rank for rank in range(1, self.models + 1)))
        self._weights = weights
        self.held: list[tuple[int, ...]] = []
        for _ in range(nodes):
            count = self.chance.randint(1, 7)
            self.held.append(tuple(dict.fromkeys(self.popular(count))))
        self.serving = [self.chance.random() < 0.25 for _ in range(nodes)]  # the first that it holds

    def popular(self, count: int) -> list[int]:
        """Models, drawn by their popularity."""
        return self.chance.choices(range(self.models), cum_weights=self._weights, k=count)

    def interests(self, count: int) -> list[int]:
        """So many different models that somebody cares for."""
        found: dict[int, None] = {}
        while len(found) < count:
            found |= dict.fromkeys(self.popular(count))
        return list(found)[:count]

    def topics(self, models: Iterable[int]) -> frozenset[str]:
        return sharding.topics(MAIN, map(code, models), self.size)

    @cached_property
    def members(self) -> dict[str, list[tuple[int, bool]]]:
        """The nodes of each topic, and whether they serve a model there."""
        found: dict[str, dict[int, bool]] = defaultdict(dict)
        for node, held in enumerate(self.held):
            for place, model in enumerate(held):
                for topic in self.topics((model,)):
                    serves = self.serving[node] and place == 0
                    found[topic][node] = found[topic].get(node, False) or serves
        return {topic: list(nodes.items()) for topic, nodes in found.items()}


@cache
def code(model: int) -> str:
    return code_of_infohash_v2(hashlib.sha256(b"model %d" % model).hexdigest())


@cache
def _identity(model: int) -> tuple[str, str, str, str, str]:
    name = b"model %d" % model
    infohash, infohash_v2 = hashlib.sha1(name).hexdigest(), hashlib.sha256(name).hexdigest()
    return leaf_cid(name), infohash, infohash_v2, leaf_cid(b"manifest of " + name), f"model-{model}-instruct"


def offer(node: str, model: int, *, serving: bool, chance: random.Random) -> Offer:
    slots, seeders = chance.randint(0, 4), chance.randint(1, 30)
    return Offer(node, *_identity(model), 4 << 30, serving, slots if serving else 0, 8192, seeders, chance.randint(0, 60), 21.5)


class Speaker:
    """One node that speaks: it signs its page, and beats. Everything it says lives as long as it is told to."""

    def __init__(self, population: Population, number: int) -> None:
        self.key = Ed25519PrivateKey.generate()
        self.node = key_name(self.key)
        self.page = b""
        self._population = population
        self._number = number
        self._revision = 0
        host = f"198.51.{number // 250 % 250}.{number % 250 + 1}"
        self._address = Address(
            self.node, (f"/ip4/{host}/tcp/4001/p2p/{PEER_ID}",), (f"{host}:6881",), (f"http://{host}:8788",)
        )

    def beat(self, now: float, lifetime_s: float) -> bytes:
        return self._say((), None, now, lifetime_s)

    def changed(self, now: float, lifetime_s: float) -> bytes:
        """The page anew: it has other numbers, or another model."""
        held, population = self._population.held[self._number], self._population
        serving = population.serving[self._number]
        offers = tuple(
            offer(self.node, model, serving=serving and place == 0, chance=population.chance)
            for place, model in enumerate(held)
        )
        self._revision = int(now * 1000)
        self.page = self._say(offers, 0, now, lifetime_s)
        return self.page

    def _say(self, offers: tuple[Offer, ...], page: int | None, now: float, lifetime_s: float) -> bytes:
        expires, key = int(now + lifetime_s), SealKey(7, "ab" * 32, int(now) + 3600)
        said = Announcement(
            self.node, PEER_ID, int(now * 1000), expires, self._address, (key,), offers, page, (self._revision,)
        )
        return sign(rules.PAYLOAD_TYPE, rules.build(said), self.key)
