"""A large swarm in virtual time: the words are really signed, and one node hears them with its real rules, pace and table.

Prints figures and asserts only that what was heard is known. What is simulated and not measured: who holds what
(population.py), how words spread between nodes (`spread`), and the shards of a swarm of more than 1,000 nodes, which the daemon
does not use yet (registry/sharding.py). Bytes are those of the envelopes that come in; gossipsub's own are not among them.
"""

from __future__ import annotations

import base64
import heapq
import json
import math
import random
import statistics
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from daemon.gossip import pace
from daemon.gossip.pages import Card, OwnPages
from daemon.gossip.peers import PEERS_LIMIT, PeerTable
from daemon.ledger import LedgerThread
from registry import announcement as rules
from registry import routing, sharding
from registry.catalogue import Catalogue
from registry.envelope import key_name, pae
from registry.errors import Stale
from registry.records import Address, SealKey
from tests.bench.population import MAIN, PEER_ID, Population, Speaker, code, offer

INTERESTS = 20  # codes that a node cares for
START = 1_800_000_000.0
CHANGE_S = 1800.0  # a node's models change as often, on average
STAY_S = 7200.0  # and it stays for so long
HOP_MS = (2.3, 40.0)  # median of one gossipsub hop: measured over Kubo on loopback; as between homes on the internet
MESH = 6  # gossipsub's D
EXCHANGE = 600  # bytes of HTTP around a page that is asked for

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[LedgerThread]:
    ledger = await LedgerThread.open(tmp_path / "ledger.db")
    yield ledger
    await ledger.close()


class Ear:
    """The receiving node."""

    def __init__(self, ledger: LedgerThread) -> None:
        self.now = START
        self.table = PeerTable(ledger, own="ed25519:" + "ab" * 32, clock=lambda: self.now, standing=lambda key: None)
        self.accept_s = {"beats": 0.0, "pages": 0.0}
        self.raw_s = {"beats": 0.0, "pages": 0.0}  # of the signature checks alone, taken in turn

    def hears(self, word: bytes) -> None:
        began = time.perf_counter()
        try:
            said = self.table.accept(word)
        except Stale:  # said on two of our topics
            return
        kind = "beats" if said.page is None else "pages"
        self.accept_s[kind] += time.perf_counter() - began
        self.raw_s[kind] += _raw_s(word)


class Talk:
    """What is said on the topics of one node, in order of time: (time, speaker, whether it is a change, its lifetime)."""

    def __init__(self, population: Population, interests: list[int]) -> None:
        self._population = population
        self._chance = random.Random(1)
        self.known = 0
        self._due: list[tuple[float, int, float]] = []
        self.topics = population.topics(interests)
        for topic in self.topics:
            speakers = self._speakers(topic)
            self.known += len(speakers)
            interval = self._interval(topic, len(speakers))
            self._due += [(START + self._chance.random() * interval, number, interval) for number in speakers]
        heapq.heapify(self._due)

    def until(self, end: float) -> Iterator[tuple[float, int, bool, float]]:
        while self._due and self._due[0][0] < end:
            now, number, interval = self._due[0]
            wait = self._chance.expovariate(1 / CHANGE_S)
            change = wait < interval
            heapq.heapreplace(self._due, (now + (wait if change else interval), number, interval))
            yield now, number, change, pace.lifetime_s(interval)

    def _speakers(self, topic: str) -> list[int]:
        """Those on a topic that speak: on a crowded shard the lot decides, and has settled."""
        members = self._population.members.get(topic, [])
        if topic == MAIN:
            return [number for number, _ in members]
        found: list[int] = []
        for serving, room in ((True, sharding.ROOM_SERVING), (False, sharding.ROOM_HOLDING)):
            group = [number for number, serves in members if serves == serving]
            share = 1.0
            for _ in range(4):
                heard = sum(sharding.drawn(f"node {number}", topic, START, share) for number in group)
                share = sharding.next_share(share, heard, room)
            found += [number for number in group if sharding.drawn(f"node {number}", topic, START, share)]
        return found

    def _interval(self, topic: str, speakers: int) -> float:
        if topic == MAIN:
            return pace.interval_s(pace.HEARTBEAT_S, speakers)
        return sharding.interval_s(pace.HEARTBEAT_S, speakers)


@pytest.mark.parametrize("nodes", [200, 1000, 10_000, 100_000])
async def test_bytes_per_second(nodes: int, ledger: LedgerThread) -> None:
    population = Population(nodes)
    interests = population.interests(INTERESTS)
    ear, talk = Ear(ledger), Talk(population, interests)
    speakers: dict[int, Speaker] = {}
    first: dict[int, float] = {}
    beats: list[int] = []
    counted = {"beats": 0, "changes": 0, "asked for": 0}
    begin, end = START + pace.LONGEST_HEARTBEAT_S, START + 3 * pace.LONGEST_HEARTBEAT_S
    for now, number, change, lifetime in talk.until(end):
        ear.now = now
        if number not in speakers or now - first[number] > STAY_S * random.Random(number).random():
            # New, or somebody else in its place.
            speakers[number], first[number] = Speaker(population, number), now
            speakers[number].changed(now - 60, lifetime + 60)
        speaker = speakers[number]
        word = speaker.changed(now, lifetime) if change else speaker.beat(now, lifetime)
        ear.hears(word)
        cost = {"changes" if change else "beats": len(word)}
        if ear.table.is_behind(speaker.node):
            ear.hears(speaker.page)
            cost["asked for"] = len(speaker.page) + EXCHANGE
        if not change:
            beats.append(len(word))
        if now >= begin:
            for what, size in cost.items():
                counted[what] += size
    assert ear.table.behind() == {} and ear.table.count() > 0
    rates = {what: size / (end - begin) / 1000 for what, size in counted.items()}
    held = sum(len(population.members[topic]) for topic in talk.topics if topic in population.members)
    print(
        f"\n{nodes:7,} nodes, {len(talk.topics)} topics: {sum(rates.values()):5.1f} KB/s"
        f" ({', '.join(f'{what} {rate:.1f}' for what, rate in rates.items())});"
        f" {ear.table.count():,} nodes listed of {held:,} on these topics"
    )
    speeds = [f"{kind} {raw / ear.accept_s[kind]:.2f}" for kind, raw in ear.raw_s.items()]
    if MAIN not in talk.topics:
        # What the daemon does now: everybody on one topic, as slowly as it may.
        interval = pace.interval_s(pace.HEARTBEAT_S, min(nodes, PEERS_LIMIT))
        rate = nodes / interval * statistics.mean(beats) / 1000
        print(f"         without shards, as the daemon does now: beats alone {rate:.0f} KB/s")
    print(f"         accepted/s against the raw rate of the signature check: {', '.join(speeds)}")


def _raw_s(word: bytes) -> float:
    """Seconds that the signature check of a word takes alone."""
    fields = json.loads(word)
    (signature,) = fields["signatures"]
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signature["keyid"].removeprefix("ed25519:")))
    message = pae(rules.PAYLOAD_TYPE, base64.b64decode(fields["payload"]))
    signed = base64.b64decode(signature["sig"])
    began = time.perf_counter()
    key.verify(signed, message)
    return time.perf_counter() - began


@pytest.mark.parametrize("nodes", [200, 1000, 10_000, 100_000])
def test_time_until_a_change_is_known(nodes: int) -> None:
    """Random meshes of the size of the topic: with shards, those who hold a model of it or care for one."""
    population = Population(nodes)
    interests = population.interests(INTERESTS)
    topics = sorted(population.topics(interests), key=lambda topic: len(population.members.get(topic, ())))
    crowded = len(population.members[topics[-1]])
    caring = 0 if topics == [MAIN] else nodes * INTERESTS // sharding.SHARDS
    told = []
    for hop in HOP_MS:
        seconds = [spread(min(nodes, crowded + caring), hop / 1000, random.Random(seed)) for seed in range(3)]
        told.append(f"{1000 * (pace.COALESCE_S + statistics.median(seconds)):.0f} ms at {hop} ms a hop")
    print(f"\n{nodes:7,} nodes: 99 % of the {crowded + caring:,} on the most crowded topic know after {', '.join(told)}")


def spread(members: int, hop_s: float, chance: random.Random) -> float:
    """Seconds until 99 % have heard: the shortest way through a mesh in which everybody has `MESH` neighbours, about."""
    links: list[list[int]] = [[] for _ in range(members)]
    for one in range(members):
        for _ in range(MESH // 2):
            other = chance.randrange(members)
            links[one].append(other)
            links[other].append(one)
    heard = [math.inf] * members
    heard[0] = 0.0
    due, done = [(0.0, 0)], 0
    while due:
        now, one = heapq.heappop(due)
        if now > heard[one]:
            continue
        done += 1
        if done >= 0.99 * members:
            return now
        for other in links[one]:
            then = now + hop_s * chance.lognormvariate(0, 0.5)
            if then < heard[other]:
                heard[other] = then
                heapq.heappush(due, (then, other))
    return math.inf


async def test_memory_of_the_table(ledger: LedgerThread) -> None:
    population = Population(PEERS_LIMIT)
    ear = Ear(ledger)
    words: list[bytes] = []
    for number in range(PEERS_LIMIT):
        speaker = Speaker(population, number)
        words += [speaker.changed(START, 600), speaker.beat(START + 1, 600)]
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for word in words:
        ear.table.accept(bytes(bytearray(word)))  # its own copy, as from a socket
    await ear.table.mirror()
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    offers = len(ear.table.offers())
    assert ear.table.count() == PEERS_LIMIT and offers > PEERS_LIMIT
    print(f"\na full table: {PEERS_LIMIT:,} nodes, {offers:,} offers, {used / 1e6:.0f} MB, {used / PEERS_LIMIT / 1000:.1f} KB a node")


def test_the_best_of_100_000_offers() -> None:
    population = Population(27_000)
    catalogue = Catalogue()
    for number, held in enumerate(population.held):
        node = f"ed25519:{number:064x}"
        catalogue.put((node, 0), [offer(node, model, serving=population.serving[number] and not place, chance=population.chance)
                                  for place, model in enumerate(held)])  # fmt: skip
    # As many of one model as a node can know of in a swarm of this size, and without that bound.
    room = sharding.ROOM_SERVING + sharding.ROOM_HOLDING
    asked = [code(model)[:7] for model in range(population.models)]
    popular = [code(model)[:7] for model in population.popular(1500)]
    print(f"\nthe best of {catalogue.count:,} offers of {population.models:,} models, by code:")
    print(f"    each model once       {_told(catalogue, asked)}")
    print(f"    as models are popular {_told(catalogue, popular)}")
    few = [word for word in popular if len(catalogue.about(word)) <= 4 * room]
    print(f"    the same, models that at most {4 * room} nodes offer {_told(catalogue, few)}")


def _told(catalogue: Catalogue, asked: list[str]) -> str:
    seconds, most = [], 0
    for wanted in asked:
        began = time.perf_counter()
        found = routing.candidates(catalogue.about(wanted), wanted=wanted)
        seconds.append(time.perf_counter() - began)
        most = max(most, len(found))
    seconds.sort()
    ninety_nine = seconds[int(len(seconds) * 0.99)]
    return f"p50 {1000 * statistics.median(seconds):.2f} ms, p99 {1000 * ninety_nine:.2f} ms, up to {most:,} nodes"


async def test_what_a_change_costs_with_200_models(ledger: LedgerThread) -> None:
    key, chance = Ed25519PrivateKey.generate(), random.Random(1)
    node, now = key_name(key), [START]
    offers = [offer(node, model, serving=model < 3, chance=chance) for model in range(200)]
    address = Address(node, (f"/ip4/198.51.100.1/tcp/4001/p2p/{PEER_ID}",), (), ("http://198.51.100.1:8788",))
    card = Card(PEER_ID, address, SealKey(7, "ab" * 32, int(START) + 3600))

    pages = OwnPages(key, ledger, card=lambda: card, offers=lambda: list(offers), clock=lambda: now[0])
    await pages.open()
    sizes = {"all": sum(map(len, await pages.renew(39)))}
    for what, change in {
        "one model more": lambda: offers.append(offer(node, 200, serving=True, chance=chance)),
        "one model less": lambda: offers.pop(100),
        "a beat": lambda: None,
    }.items():
        change()
        now[0] += 12
        words = await pages.renew(39)
        sizes[what] = sum(map(len, words))
        assert len(words) == 1
    told = ", ".join(f"{what} {size:,} bytes" for what, size in sizes.items())
    print(f"\na node with 200 models: {told} (before, each change and each heartbeat: all)")
