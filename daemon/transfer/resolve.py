"""From what a person typed to a plan: which bytes are wanted, what is promised about them, and who has them.

A manifest is believed only when its signature verifies, and only about the bytes that were asked for; where an offer
or a magnet names a manifest, the pull does not go on without it. "Wrong" (a bad signature) and "could not check" (nobody gave it)
are told apart.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from daemon.errors import Ambiguous, NotFound, Refused, SwarmError, Unavailable, Unserved, UsageError, VerificationError
from daemon.gossip.rendezvous import Search
from daemon.ipfs.interface import IpfsNode
from daemon.torrent import metainfo
from daemon.transfer import manifests
from daemon.transfer.objects import MANIFEST_LIMIT, TORRENT_LIMIT, Objects, object_cid
from daemon.trust import TrustBook
from registry import codes, envelope, manifest, refs, routing, upstream
from registry.errors import Malformed, NotVerified
from registry.records import Identity, Model, Offer, Peer, Trust

log = logging.getLogger(__name__)

_GOSSIP_WAIT_S = 3.0  # how long an unknown code may take to be announced
_LOOK_S = 0.25
_MANIFESTS = 16  # of one model that are looked at, those that most nodes name first
_STANDING: tuple[Trust, ...] = ("trusted", "pinned", "unknown", "MISMATCH", "blocked")
_CID_DEADLINE_S = 30.0  # how long IPFS may look for a bare CID
_MANIFEST_S = 30.0  # for a manifest over BitTorrent: its DHT is entered within 15 s, and asked within 2


@dataclass(frozen=True, slots=True)
class Plan:
    """What is wanted and what is known about it; None means not known yet."""

    ref: str
    name: str = ""
    size: int | None = None
    cid: str | None = None
    infohash: str | None = None
    infohash_v2: str | None = None
    identity: Identity | None = None  # what the signed manifest promises
    envelope: str | None = None
    manifest: str | None = None  # CID of the envelope
    signed_by: str | None = None
    source: str | None = None
    torrent: bytes | None = None
    holders: tuple[Peer, ...] = ()
    bittorrent: tuple[str, ...] = ()  # host:port that the reference itself named
    manifest_torrent: str | None = None  # v1 infohash of the manifest that the magnet names
    file: Path | None = None  # a local file to take in

    @property
    def key(self) -> str:
        """Names the partial download, so that the next try finds it."""
        key = self.infohash_v2 or self.infohash or self.cid
        if key is None:
            raise ValueError("a plan without any identity")
        return key


class Announced(Protocol):
    """What other nodes announce."""

    def offers(self) -> Sequence[Offer]: ...

    def offers_about(self, wanted: str) -> Sequence[Offer]:
        """At least those of `offers()` that the reference `wanted` can mean, found without looking at all of them."""
        ...

    def peer(self, node: str) -> Peer | None: ...


class SmallTorrents(Protocol):
    """What is asked of `TorrentSession`."""

    async def fetch_small(
        self, infohash: str, peers: Sequence[tuple[str, int]] = (), *, limit: int, deadline_s: float
    ) -> bytes: ...


class Resolver:
    """`search` looks for nodes that have what a reference means, until its second argument says that it was found.

    `torrents` is None where BitTorrent is switched off.
    """

    def __init__(
        self,
        objects: Objects,
        peers: Announced,
        trust: TrustBook,
        ipfs: Callable[[], IpfsNode | None],
        ipfs_enabled: bool,
        search: Search,
        torrents: SmallTorrents | None,
    ) -> None:
        self._torrents = torrents
        self._objects = objects
        self._peers = peers
        self._trust = trust
        self._ipfs = ipfs
        self._ipfs_enabled = ipfs_enabled
        self._search = search

    async def resolve(self, text: str) -> Plan:
        """Raises `UsageError`, `NotFound`, `Ambiguous`, `Unserved`, `VerificationError` or `Refused`."""
        match parse(text):
            case refs.PathRef(path=path):
                return Plan(ref=text, name=Path(path).stem, file=Path(path))
            case refs.CodeRef() | refs.NameRef() as ref:
                return self._allowed(await self._from_offers(text, await self._announced(text, ref)))
            case refs.CidRef(cid=cid):
                return await self._from_cid(text, cid)
            case refs.MagnetRef() as magnet:
                return await self._from_magnet(text, magnet)
            case refs.HfRef() | refs.UrlRef():
                raise UsageError(
                    text, "hf: and https references cannot be pulled yet", "download the file and publish it, or use a code, CID or magnet"
                )

    def _allowed(self, plan: Plan) -> Plan:
        """Of a code or a name, which others can fit to their bytes, what nobody signed under a publisher's name is refused."""
        if plan.signed_by is None and self._trust.publisher(plan.name) is not None:
            raise Refused(
                plan.name,
                "nobody signed these bytes, and a publisher is known for this name",
                f"check with the publisher; swarmctl pull {plan.cid} takes them without a signature and under another name",
            )
        return plan

    # -- offers -----------------------------------------------------------------------------------------------------

    async def _announced(self, text: str, ref: refs.CodeRef | refs.NameRef) -> list[Offer]:
        offers = await self._heard_of(text, lambda offer: _offered_as(ref, offer))
        models = routing.aggregate(offers, ())
        if not models:
            raise NotFound(
                text, "no node that this one knows announces it", "swarmctl models lists what is announced; swarmctl join adds a node"
            )
        if len(models) > 1:
            told = codes.told_apart([model.codes[0] for model in models])
            listing = ", ".join(f"{code} {model.name}" for code, model in zip(told, models, strict=True))
            raise Ambiguous(text, f"means {len(models)} models: {listing}", "use a longer code or the CID")
        return offers

    async def _heard_of(self, text: str, matches: Callable[[Offer], bool]) -> list[Offer]:
        """The offers that match, once there are any; looked for where nobody has announced one in a moment."""

        def matching() -> list[Offer]:
            return [offer for offer in self._peers.offers_about(text) if matches(offer)]

        if not matching():
            deadline = time.monotonic() + _GOSSIP_WAIT_S
            search = asyncio.ensure_future(self._search(text, lambda: bool(matching())))
            try:
                while not matching() and (time.monotonic() < deadline or not search.done()):  # noqa: ASYNC110 - no event tells
                    await asyncio.sleep(_LOOK_S)
            finally:
                search.cancel()
                await asyncio.gather(search, return_exceptions=True)
        return matching()

    async def _from_offers(self, text: str, offers: Sequence[Offer]) -> Plan:
        """What most nodes say comes first. Each offer stands for itself: a lie in one must not speak against the others' manifest."""
        if any(upstream.proven(offer) for offer in offers):
            raise UsageError(text, "nodes answer for it from an upstream, there is no file to fetch", "swarmctl ask asks it")
        holders = self._peers_of(offers)
        votes = Counter(_claim(offer) for offer in offers)
        distinct = {_claim(offer): offer for offer in offers}
        plans = [
            Plan(
                ref=text, name=offer.name, size=offer.size, cid=offer.cid, infohash=offer.infohash, infohash_v2=offer.infohash_v2,
                manifest=offer.manifest, holders=holders,
            )
            for offer in sorted(distinct.values(), key=lambda offer: -votes[_claim(offer)])
        ]  # fmt: skip
        signed = [plan for plan in plans if plan.manifest is not None]
        return await self._with_manifest(signed) if signed else plans[0]

    def _peers_of(self, offers: Sequence[Offer]) -> tuple[Peer, ...]:
        nodes = dict.fromkeys(offer.node for offer in offers)
        peers = (self._peers.peer(node) for node in nodes)
        return tuple(peer for peer in peers if peer is not None)

    def holders_of(self, plan: Plan) -> tuple[Peer, ...]:
        """Whoever has it by now: nodes that announced it since the plan was made come in as well."""
        by_node = {peer.node: peer for peer in [*plan.holders, *self._peers_of(self._offers_of(plan))]}
        return tuple(by_node.values())

    def _offers_of(self, plan: Plan) -> list[Offer]:
        def same(offer: Offer) -> bool:
            pairs = ((offer.cid, plan.cid), (offer.infohash, plan.infohash), (offer.infohash_v2, plan.infohash_v2))
            return any(offered is not None and offered == wanted for offered, wanted in pairs)

        return [offer for offer in self._peers.offers() if same(offer)]

    # -- manifests --------------------------------------------------------------------------------------------------

    async def _with_manifest(self, plans: Sequence[Plan]) -> Plan:
        """The plan whose manifest verifies and whose signer is trusted most. Raises what was wrong with them when there is none.

        All are asked for at once, so that those who announce manifests that nobody gives cannot keep it waiting one by one.
        """
        outcomes = await asyncio.gather(*(self._signed(plan) for plan in plans[:_MANIFESTS]), return_exceptions=True)
        signed = [outcome for outcome in outcomes if isinstance(outcome, Plan)]
        if signed:
            return min(signed, key=lambda plan: _STANDING.index(self._trust.decide(plan.signed_by, plan.name)))
        for outcome in outcomes:
            if isinstance(outcome, BaseException) and not isinstance(outcome, Unserved):
                raise outcome
        raise VerificationError(
            plans[0].name or plans[0].ref,
            "its signature could not be checked, nobody gave the manifest",
            "try again when its publisher is online",
        )

    def manifests_of(self, model: Model) -> frozenset[str]:
        """The CIDs of the manifests that others announce for these bytes."""
        return frozenset(offer.manifest for offer in self._offers_of(_plan_of(model)) if offer.manifest)

    async def vouched(self, model: Model) -> Plan:
        """What the best of these manifests says. Raises as `believe`, and `VerificationError` when nobody gives one."""
        plan = _plan_of(model)
        plan = replace(plan, holders=self.holders_of(plan))
        return await self._with_manifest([replace(plan, manifest=cid) for cid in self.manifests_of(model)])

    async def _signed(self, plan: Plan) -> Plan:
        cid = str(plan.manifest)
        return self.believe(plan, cid, await self._objects.get(cid, plan.holders, limit=MANIFEST_LIMIT))

    def believe(self, plan: Plan, cid: str, data: bytes) -> Plan:
        """What a manifest's signer promises about the plan's bytes. Raises `VerificationError` or `Refused`."""
        what = plan.name or plan.ref
        try:
            opened = envelope.open_envelope(data, manifest.PAYLOAD_TYPE, limit=MANIFEST_LIMIT)
            claims = manifest.parse(opened.payload)
        except (NotVerified, Malformed) as error:
            raise VerificationError(what, f"its manifest does not verify: {error}", "ask its publisher for a new one") from error
        identity = claims.identity
        asked = (
            ("CID", plan.cid, identity.cid),
            ("infohash", plan.infohash, identity.infohash),
            ("infohash", plan.infohash_v2, identity.infohash_v2),
        )
        for kind, wanted, promised in asked:
            if wanted is not None and wanted != promised:
                raise VerificationError(what, f"its manifest speaks of another {kind}", "check the reference with whoever gave it")
        signer = min(opened.keys, key=lambda key: _STANDING.index(self._trust.decide(key, claims.name)))
        self._trust.require(signer, claims.name)
        return replace(
            plan, name=claims.name, size=identity.size, cid=identity.cid, infohash=identity.infohash, infohash_v2=identity.infohash_v2,
            identity=identity, envelope=data.decode(), manifest=cid, signed_by=signer, source=claims.source,
            torrent=plan.torrent,
        )  # fmt: skip

    # -- bare CIDs and magnets --------------------------------------------------------------------------------------

    async def _from_cid(self, text: str, cid: str) -> Plan:
        about = self._peers.offers_about(cid)
        offers = [offer for offer in about if cid in (offer.cid, offer.manifest)]
        if offers:
            return await self._from_offers(text, offers)
        node = self._ipfs()
        if node is None:
            why = "IPFS is not running" if self._ipfs_enabled else "IPFS is switched off"
            raise Unavailable(
                text, f"{why} and no node announces this CID", "swarmctl doctor tells what is missing; a code or magnet works without IPFS"
            )
        size = await node.size(cid, deadline_s=_CID_DEADLINE_S)
        if size <= MANIFEST_LIMIT:
            data = await node.read_bytes(cid, limit=MANIFEST_LIMIT, deadline_s=_CID_DEADLINE_S)
            if data.lstrip().startswith(b"{"):
                return await self._from_manifest(text, cid, data)
        return Plan(ref=text, name=cid, size=size, cid=cid)

    async def _from_manifest(self, text: str, cid: str, data: bytes) -> Plan:
        if object_cid(data) != cid:
            raise VerificationError(text, "IPFS gave other bytes for the manifest", "try again")
        plan = self.believe(Plan(ref=text), cid, data)
        return replace(plan, holders=self.holders_of(plan))

    async def _from_magnet(self, text: str, magnet: refs.MagnetRef) -> Plan:
        def same(offer: Offer) -> bool:
            return bool(
                (magnet.infohash and offer.infohash == magnet.infohash) or (magnet.infohash_v2 and offer.infohash_v2 == magnet.infohash_v2)
            )

        offers = [offer for offer in self._peers.offers_about(text) if same(offer)]
        if not offers and self._torrents is None:
            # BitTorrent, which would ask others for the rest, is off: only who announces it can tell what it is.
            offers = await self._heard_of(text, same)
        known = Plan(
            ref=text, name=magnet.name or "", size=magnet.size, infohash=magnet.infohash, infohash_v2=magnet.infohash_v2,
            bittorrent=magnet.peers, manifest_torrent=magnet.manifest,
        )  # fmt: skip
        if not offers:
            return known
        if magnet.manifest is not None:
            return replace(known, holders=self._peers_of(offers))
        plan = replace(await self._from_offers(text, offers), bittorrent=magnet.peers)
        if plan.signed_by is not None:
            return plan
        # Without a signature only the magnet says which bytes are wanted. Where the offers differ, one of them lies about them.
        agreed = len({(offer.cid, offer.size) for offer in offers}) == 1
        return replace(known, holders=plan.holders, cid=plan.cid if agreed else None, size=plan.size if agreed else magnet.size)

    async def named_manifest(self, plan: Plan, peers: Sequence[tuple[str, int]]) -> Plan:
        """The plan with the manifest that its magnet names, which is asked of the BitTorrent swarm, of `peers` (IP, port), and
        of those who announce it.

        Raises as `believe`, and `VerificationError` when nobody gives it: what was to be signed is not taken unsigned.
        """
        infohash = plan.manifest_torrent
        assert infohash is not None
        announced = dict.fromkeys(offer.manifest for offer in self._offers_of(plan) if offer.manifest)
        holders = self.holders_of(plan)
        asks = [self._announced_as(cid, holders, infohash) for cid in list(announced)[:_MANIFESTS]]
        if self._torrents is not None:
            asks.append(_from_swarm(self._torrents, infohash, peers))
        envelope = await _first_of(asks)
        if envelope is None:
            raise VerificationError(
                plan.name or plan.ref,
                "its signature could not be checked, nobody gave the manifest that the magnet names",
                "try again when its publisher is online, or with a newer magnet",
            )
        data = envelope.encode()
        return self.believe(plan, object_cid(data), data)

    async def _announced_as(self, cid: str, holders: Sequence[Peer], infohash: str) -> str:
        """A manifest that somebody announces, if it is the one with the infohash. Raises `Unserved`."""
        data = await self._objects.get(cid, holders, limit=MANIFEST_LIMIT)
        try:
            return manifests.checked(data, infohash)
        except VerificationError as error:
            raise Unserved(cid, "it is another manifest of the same bytes") from error

    # -- the torrent ------------------------------------------------------------------------------------------------

    async def published_torrent(self, plan: Plan) -> bytes | None:
        """The .torrent that the plan's manifest or its holders name; None when there is none to be had this way."""
        if plan.envelope is None:
            return None
        named = manifest.parse(envelope.open_envelope(plan.envelope.encode(), manifest.PAYLOAD_TYPE, limit=MANIFEST_LIMIT).payload).torrent
        if named is None:
            return None
        try:
            return check_torrent(plan, await self._objects.get(named, plan.holders, limit=TORRENT_LIMIT))
        except Unserved:
            return None


async def _from_swarm(torrents: SmallTorrents, infohash: str, peers: Sequence[tuple[str, int]]) -> str:
    data = await torrents.fetch_small(infohash, peers, limit=MANIFEST_LIMIT, deadline_s=_MANIFEST_S)
    return manifests.checked(data, infohash)


async def _first_of(asks: Iterable[Coroutine[Any, Any, str]]) -> str | None:
    """The first manifest to come; None when nobody gives one, `VerificationError` when what came is wrong."""
    tasks = [asyncio.create_task(ask) for ask in asks]
    wrong: VerificationError | None = None
    try:
        for first in asyncio.as_completed(tasks):
            try:
                return await first
            except VerificationError as error:
                wrong = error
            except SwarmError as error:
                log.debug("the manifest was not to be had there: %s", error)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if wrong is not None:
        raise wrong
    return None


def parse(text: str) -> refs.Ref:
    try:
        return refs.parse_ref(text)
    except Malformed as error:
        raise UsageError(text[:80], str(error), "use a code, a CID, a magnet, a manifest CID or a path that starts with / or ./") from error


def check_torrent(plan: Plan, torrent: bytes) -> bytes:
    """The torrent itself, if it is of the bytes that the plan promises. Raises `VerificationError`."""
    try:
        facts = metainfo.parse(torrent)
    except SwarmError as error:
        raise VerificationError(plan.name or plan.ref, f"its torrent cannot be used: {error.why}", "try another source") from error
    promised = (
        (facts.infohash, plan.infohash),
        (facts.infohash_v2, plan.infohash_v2),
        (facts.size, plan.size),
        (facts.name, plan.identity.filename if plan.identity else None),
    )
    if any(expected is not None and found != expected for found, expected in promised):
        raise VerificationError(plan.name or plan.ref, "its torrent is of other bytes than promised", "try another source")
    return torrent


def _plan_of(model: Model) -> Plan:
    identity = model.identity
    return Plan(
        ref=identity.cid,
        name=model.name,
        size=identity.size,
        cid=identity.cid,
        infohash=identity.infohash,
        infohash_v2=identity.infohash_v2,
    )


def _claim(offer: Offer) -> tuple[str | None, ...]:
    return (offer.manifest, offer.cid, offer.infohash, offer.infohash_v2)


def _offered_as(ref: refs.CodeRef | refs.NameRef, offer: Offer) -> bool:
    if isinstance(ref, refs.NameRef):
        return offer.name == ref.name or ref.name.lower() in (offer.infohash, offer.infohash_v2)
    return offer.name == ref.name or any(full.startswith(ref.code) for full in codes.codes_of(offer.cid, offer.infohash_v2))
