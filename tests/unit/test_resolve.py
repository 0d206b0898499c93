"""Whose word counts: several manifests of the same bytes, several keys of one manifest, and offers that nobody signed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from daemon.errors import Refused, Unserved, UsageError, VerificationError
from daemon.ledger import LedgerThread
from daemon.transfer import manifests
from daemon.transfer.objects import object_cid
from daemon.transfer.resolve import Plan, Resolver
from daemon.trust import TrustBook
from registry import codes, envelope, manifest, refs, strictjson, upstream
from registry.catalogue import Catalogue
from registry.records import GgufFacts, Identity, Offer, Peer
from tests.functional.swarm_nodes import nowhere

CID = object_cid(b"the bytes")
IDENTITY = Identity(9, "aa" * 32, "bb" * 32, CID, "cc" * 20, "dd" * 32)
ALICE, MALLORY = Ed25519PrivateKey.from_private_bytes(b"a" * 32), Ed25519PrivateKey.from_private_bytes(b"m" * 32)


def signed(*keys: Ed25519PrivateKey, name: str = "Qwen") -> bytes:
    claims = manifest.Manifest(
        identity=IDENTITY, name=name, facts=GgufFacts("llama", None, None, None, None, None, None), torrent=None, source=None,
        created="2026-11-21T12:00:00Z",
    )  # fmt: skip
    each = [strictjson.loads(envelope.sign(manifest.PAYLOAD_TYPE, manifest.build(claims), key), limit=1 << 16, what="it") for key in keys]
    return strictjson.dumps({**each[0], "signatures": [one["signatures"][0] for one in each]})


class World:
    """What others announce and give. An object that nobody gives is looked for until everything else has been tried."""

    def __init__(self) -> None:
        self.found: list[Offer] = []
        self.objects: dict[str, bytes] = {}
        self.torrents: dict[str, bytes] = {}  # small ones, by v1 infohash
        self.asked: list[str] = []

    def offer(self, data: bytes | None, **more: Any) -> None:
        made = Offer(
            f"node {len(self.found)}", CID, IDENTITY.infohash, IDENTITY.infohash_v2, None if data is None else object_cid(data), "Qwen", 9,
            serving=False,
        )  # fmt: skip
        self.found.append(replace(made, **more))
        if data is not None:
            self.objects[object_cid(data)] = data

    def offers(self) -> Sequence[Offer]:
        return self.found

    def offers_about(self, wanted: str) -> Sequence[Offer]:
        catalogue = Catalogue()
        for number, offer in enumerate(self.found):
            catalogue.put((offer.node, number), [offer])
        return catalogue.about(wanted)

    def peer(self, node: str) -> Peer | None:
        return None

    async def get(self, cid: str, holders: object, *, limit: int) -> bytes:
        self.asked.append(cid)
        if self.objects[cid]:
            return self.objects[cid]
        while len(set(self.asked)) < len(self.objects):
            await asyncio.sleep(0)
        raise Unserved(cid, "nobody gave it")


    async def fetch_small(self, infohash: str, peers: object, *, limit: int, deadline_s: float) -> bytes:
        if infohash in self.torrents:
            return self.torrents[infohash]
        raise Unserved("torrent", "no node gave it whole")


@pytest.fixture
async def trust(tmp_path: Path) -> Any:
    ledger = await LedgerThread.open(tmp_path / "ledger.db")
    book = TrustBook(ledger, "ed25519:" + "00" * 32)
    await book.open()
    yield book
    await ledger.close()


def resolving(world: World, trust: TrustBook) -> Resolver:
    return Resolver(world, world, trust, lambda: None, False, nowhere, world)  # type: ignore[arg-type]  # only `get` of the objects is asked


async def resolved(world: World, trust: TrustBook, ref: str = CID) -> Plan:
    async with asyncio.timeout(20):
        return await resolving(world, trust).resolve(ref)


async def test_a_stranger_beside_the_known_publisher_neither_wins_nor_stops_the_pull(trust: TrustBook) -> None:
    world = World()
    world.offer(signed(MALLORY))
    world.offer(signed(ALICE))
    await trust.remember(envelope.key_name(ALICE), "Qwen")
    assert (await resolved(world, trust)).signed_by == envelope.key_name(ALICE)
    await trust.set(envelope.key_name(MALLORY), "trusted")
    assert (await resolved(world, trust)).signed_by == envelope.key_name(MALLORY)
    await trust.set(envelope.key_name(MALLORY), "blocked")
    assert (await resolved(world, trust)).signed_by == envelope.key_name(ALICE)
    world.found = world.found[:1]
    with pytest.raises(Refused, match="blocked"):
        await resolved(world, trust)


async def test_manifests_that_nobody_gives_are_not_waited_for_one_by_one(trust: TrustBook) -> None:
    world = World()
    for number in range(5):
        world.offer(None, manifest=f"nobody {number}")
        world.objects[f"nobody {number}"] = b""
    with pytest.raises(VerificationError, match="could not be checked"):
        await resolved(world, trust)
    world.offer(signed(ALICE))
    assert (await resolved(world, trust)).signed_by == envelope.key_name(ALICE)


@pytest.mark.parametrize("keys", [(ALICE, MALLORY), (MALLORY, ALICE)])
async def test_of_several_signers_the_best_known_counts(trust: TrustBook, keys: tuple[Ed25519PrivateKey, ...]) -> None:
    world = World()
    world.offer(signed(*keys))
    await trust.remember(envelope.key_name(ALICE), "Qwen")
    assert (await resolved(world, trust)).signed_by == envelope.key_name(ALICE)


async def test_an_unsigned_offer_under_a_publishers_name(trust: TrustBook) -> None:
    world = World()
    world.offer(None)
    assert (await resolved(world, trust, "Qwen")).signed_by is None
    await trust.remember(envelope.key_name(ALICE), "Qwen")
    with pytest.raises(Refused, match="nobody signed these bytes"):
        await resolved(world, trust, "Qwen")
    assert (await resolved(world, trust)).signed_by is None  # the CID says itself which bytes are meant
    world.offer(signed(ALICE))
    assert (await resolved(world, trust, "Qwen")).signed_by == envelope.key_name(ALICE)  # and who leaves it out takes nothing away


async def test_a_magnet_says_itself_which_bytes_are_meant(trust: TrustBook) -> None:
    world = World()
    magnet = refs.magnet(IDENTITY.infohash, None, "Qwen", 9)
    world.offer(None)
    plan = await resolved(world, trust, magnet)
    assert (plan.cid, plan.infohash, plan.infohash_v2) == (CID, IDENTITY.infohash, None)
    world.offer(None, cid=object_cid(b"other bytes"), infohash_v2="ee" * 32, size=10)
    plan = await resolved(world, trust, magnet)
    assert (plan.cid, plan.size, plan.infohash_v2) == (None, 9, None)


def named(data: bytes) -> str:
    manifest_torrent = manifests.torrent_of(data.decode()).infohash
    return refs.magnet(IDENTITY.infohash, None, "Qwen", 9, manifest_torrent)


async def verified(world: World, trust: TrustBook, ref: str) -> Plan:
    resolver = resolving(world, trust)
    async with asyncio.timeout(20):
        return await resolver.named_manifest(await resolver.resolve(ref), [])


async def test_a_magnet_names_its_manifest_which_comes_over_bittorrent(trust: TrustBook) -> None:
    world = World()
    data = signed(ALICE)
    world.torrents[manifests.torrent_of(data.decode()).infohash] = data
    plan = await verified(world, trust, named(data))
    assert (plan.signed_by, plan.cid) == (envelope.key_name(ALICE), CID)
    assert plan.manifest == object_cid(data)


async def test_without_bittorrent_a_magnet_is_looked_for_among_those_who_announce_it(trust: TrustBook) -> None:
    world = World()
    data = signed(ALICE)

    async def search(ref: str | None, found: Callable[[], bool]) -> None:
        world.offer(data)
        assert found()

    resolver = Resolver(world, world, trust, lambda: None, False, search, None)  # type: ignore[arg-type]  # as above
    for magnet in (named(data), refs.magnet(IDENTITY.infohash, None, "Qwen", 9)):
        world.found.clear()
        plan = await resolver.resolve(magnet)
        if plan.manifest_torrent is not None:
            plan = await resolver.named_manifest(plan, [])
        assert (plan.signed_by, plan.cid) == (envelope.key_name(ALICE), CID)


async def test_a_magnets_manifest_comes_from_who_announces_it_too(trust: TrustBook) -> None:
    world = World()
    world.offer(signed(MALLORY))
    world.offer(signed(ALICE))
    plan = await verified(world, trust, named(signed(ALICE)))
    assert plan.signed_by == envelope.key_name(ALICE)


async def test_a_magnet_whose_manifest_nobody_gives_is_not_taken_unsigned(trust: TrustBook) -> None:
    world = World()
    world.offer(signed(MALLORY))  # another manifest of the same bytes is not the one that was named
    world.offer(None)
    with pytest.raises(VerificationError, match="could not be checked"):
        await verified(world, trust, named(signed(ALICE)))


async def test_what_comes_for_a_magnets_manifest_is_checked(trust: TrustBook) -> None:
    world = World()
    data = signed(ALICE)
    infohash = manifests.torrent_of(data.decode()).infohash
    world.torrents[infohash] = signed(MALLORY)
    with pytest.raises(VerificationError, match="no manifest in its form"):
        await verified(world, trust, named(data))
    other = f"magnet:?xt=urn:btih:{'99' * 20}&x.mf={infohash}"
    world.torrents[infohash] = data
    with pytest.raises(VerificationError, match="another infohash"):
        await verified(world, trust, other)
    forged = data.replace(b'"sig":"', b'"sig":"AAAA')
    infohash = manifests.torrent_of(forged.decode()).infohash
    world.torrents[infohash] = forged
    with pytest.raises(VerificationError, match="does not verify"):
        await verified(world, trust, named(forged))
    await trust.set(envelope.key_name(ALICE), "blocked")
    with pytest.raises(Refused, match="blocked"):
        await verified(world, trust, named(data))


async def test_what_is_behind_an_upstream_cannot_be_pulled(trust: TrustBook) -> None:
    world = World()
    world.found.append(upstream.offer("node", "great-1", 4))
    cid = world.found[0].cid
    for ref in (cid, codes.short(codes.code_of_cid(cid)), "great-1"):
        with pytest.raises(UsageError, match="no file to fetch"):
            await resolved(world, trust, ref)


async def test_an_upstream_does_not_stop_the_pull_of_a_file(trust: TrustBook) -> None:
    world = World()
    world.offer(signed(ALICE))
    for lie in ({"infohash_v2": IDENTITY.infohash_v2}, {"manifest": CID}):
        world.found.append(replace(upstream.offer("liar", "Qwen", 4), **lie))  # type: ignore[arg-type]  # texts
    assert (await resolved(world, trust)).signed_by == envelope.key_name(ALICE)


@pytest.mark.parametrize(
    "ref",
    [
        CID,
        object_cid(b"its manifest"),
        codes.code_of_infohash_v2(IDENTITY.infohash_v2),
        "#" + codes.short(codes.code_of_infohash_v2(IDENTITY.infohash_v2)),
        "Qwen",
        IDENTITY.infohash_v2.upper(),
        IDENTITY.infohash,
        refs.magnet(None, IDENTITY.infohash_v2, "another name", None),
    ],
)
async def test_only_what_a_reference_can_mean_is_looked_at(trust: TrustBook, ref: str) -> None:
    class Large(World):
        def offers(self) -> Sequence[Offer]:
            raise AssertionError("every offer of the swarm was looked at")

    world = Large()
    world.offer(None, manifest=object_cid(b"its manifest"))
    world.objects[object_cid(b"its manifest")] = signed(ALICE)
    world.offer(None, cid=object_cid(b"other bytes"), infohash=None, infohash_v2=None, name="other")
    plan = await resolved(world, trust, ref)
    assert (plan.cid, plan.signed_by) == (CID, envelope.key_name(ALICE))
