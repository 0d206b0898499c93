"""Which swarm this node belongs to: the open one, or a closed one that answers its members only.

Whoever speaks to other nodes is given a `Membership` and does the same in either case. In a closed swarm

    pubsub        has a topic of its own, and every message is sealed
    peer API      answers requests with a proof of membership; to all others it is an empty web server
    its bodies    are sealed, so that neither the line between two members nor a replay shows who they are
    rendezvous    keys are computed from the secret

A proof is good for one request to one node within the allowed skew of the clocks. After a restart a node does not know what it
saw before, so a proof may then be replayed within that time: what is answered is sealed, and nothing changes by it that a
member did not say.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Protocol

from aiohttp import ClientHandlerType, ClientRequest, ClientResponse, hdrs, web

from daemon.errors import Unserved, UsageError
from registry import membership as rules
from registry.errors import Malformed, NotVerified, Stale

ASKED = "Swarm-Asked"  # header between a caller and the middleware: the node key that is asked; it never leaves this process
NONCES_LIMIT = 1 << 16
_SLICE_MS = 10_000
_BEARER = "Bearer "
_SEALED_TYPE = "application/octet-stream"


class Membership(Protocol):
    """The swarm that a node belongs to."""

    topic: str  # of pubsub
    protocol: str  # of libp2p streams that lead to the peer API
    fingerprint: str  # differs between two swarms
    overhead: int  # bytes that a sealed body has more than what is in it

    def rendezvous_key(self, what: str) -> bytes:
        """20 bytes for the BitTorrent DHT; `what` is `swarm` or `code:` with 7 characters. Raises `Malformed`."""
        ...

    def rendezvous_block(self, what: str) -> bytes:
        """A small block, the same for each member, whose provider records lead to them. Raises `Malformed`."""
        ...

    def seal(self, data: bytes, what: str) -> bytes:
        """`data` as it goes over the wire, `overhead` bytes longer. `what` says what it is."""
        ...

    def open(self, data: bytes, what: str, *, limit: int) -> bytes:
        """What was sealed, at most `limit` bytes. Raises `Malformed` or `NotVerified`."""
        ...

    def media_type(self, plain: str) -> str:
        """The media type of a sealed body, which says nothing about what is in it; `plain` is that of the open swarm."""
        ...

    async def middleware(self, request: ClientRequest, handler: ClientHandlerType) -> ClientResponse:
        """For the aiohttp session that asks peer APIs: shows that we belong. Raises `Unserved` when clocks are to blame."""
        ...

    def admits(self, request: web.BaseRequest) -> bool:
        """Whether whoever asks our peer API belongs. A proof that was seen counts no second time."""
        ...


def membership(name: str, secret: str, *, node: str, clock: Callable[[], float]) -> Membership:
    """The swarm of the settings `swarm.name` and `swarm.secret`, both empty for the open one.

    `node` is our key, `clock` gives unix seconds. A closed one takes 0.1 s of computing: call it beside the loop.
    """
    check(name, secret)
    return ClosedSwarm(rules.derive(name, secret), node=node, clock=clock) if name else OpenSwarm()


def check(name: str, secret: str) -> None:
    """Raises `UsageError` for a name or secret that cannot be used; it never repeats the secret."""
    make = "make one with `python3 -c 'import secrets; print(secrets.token_urlsafe(24))'`"
    if not name and not secret:
        return
    if not secret:
        raise UsageError("swarm.secret", "a swarm with a name needs one", make)
    if not name:
        raise UsageError("swarm.name", "a swarm with a secret needs one", "all members use the same name")
    try:
        rules.check_name(name)
    except Malformed as error:
        raise UsageError("swarm.name", str(error), "all members use the same name") from error
    try:
        rules.check_secret(secret)
    except Malformed as error:
        raise UsageError("swarm.secret", str(error), make) from None


class OpenSwarm:
    """Everybody's. A `Membership`."""

    topic = rules.OPEN_TOPIC
    protocol = rules.OPEN_PROTOCOL
    fingerprint = "open"
    overhead = 0

    def rendezvous_key(self, what: str) -> bytes:
        return rules.open_key(what)

    def rendezvous_block(self, what: str) -> bytes:
        return rules.open_block(what)

    def seal(self, data: bytes, what: str) -> bytes:
        return data

    def open(self, data: bytes, what: str, *, limit: int) -> bytes:
        if len(data) > limit:
            raise Malformed(f"it has more than {limit} bytes")
        return data

    def media_type(self, plain: str) -> str:
        return plain

    async def middleware(self, request: ClientRequest, handler: ClientHandlerType) -> ClientResponse:
        request.headers.pop(ASKED, None)
        return await handler(request)

    def admits(self, request: web.BaseRequest) -> bool:
        return True


class ClosedSwarm:
    """That of those who have the secret. A `Membership`."""

    overhead = rules.SEAL_OVERHEAD

    def __init__(self, keys: rules.SwarmKeys, *, node: str, clock: Callable[[], float]) -> None:
        self.topic = keys.topic
        self.protocol = keys.protocol
        self.fingerprint = keys.fingerprint
        self._keys = keys
        self._node = node
        self._clock = clock
        self._seen = SeenNonces()

    def rendezvous_key(self, what: str) -> bytes:
        return rules.closed_key(self._keys, what)

    def rendezvous_block(self, what: str) -> bytes:
        return rules.closed_block(self._keys, what)

    def seal(self, data: bytes, what: str) -> bytes:
        return rules.seal(self._keys, os.urandom(rules.SEAL_NONCE), data, what)

    def open(self, data: bytes, what: str, *, limit: int) -> bytes:
        return rules.open_sealed(self._keys, data, what, limit=limit)

    def media_type(self, plain: str) -> str:
        return _SEALED_TYPE

    async def middleware(self, request: ClientRequest, handler: ClientHandlerType) -> ClientResponse:
        proof = rules.prove(
            self._keys,
            time_ms=self._now_ms(),
            nonce=os.urandom(rules.PROOF_NONCE),
            node=request.headers.pop(ASKED, ""),
            method=request.method,
            target=request.url.raw_path_qs,
        )
        request.headers[hdrs.AUTHORIZATION] = _BEARER + proof
        response = await handler(request)
        if response.status == 404:
            self._check_clock(response)
        return response

    def admits(self, request: web.BaseRequest) -> bool:
        given = request.headers.get(hdrs.AUTHORIZATION, "")
        now_ms = self._now_ms()
        try:
            proof = rules.check_proof(
                self._keys,
                given.removeprefix(_BEARER),
                now_ms=now_ms,
                own=self._node,
                method=request.method,
                target=request.rel_url.raw_path_qs,
            )
        except (Malformed, NotVerified, Stale):
            return False
        return self._seen.add(proof, now_ms)

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)

    def _check_clock(self, response: ClientResponse) -> None:
        """A member whose clock is off is a stranger to all others: tell its owner. The `Date` of an answer is a hint only."""
        try:
            theirs = parsedate_to_datetime(response.headers.get(hdrs.DATE, "")).timestamp()
        except (ValueError, OverflowError):
            return
        ahead_s = self._clock() - theirs
        if abs(ahead_s) * 1000 > rules.MAX_SKEW_MS:
            response.close()
            where = "ahead of" if ahead_s > 0 else "behind"
            why = f"our clock is {abs(ahead_s):.0f} s {where} its own"
            raise Unserved("peer", why, "set the clock: members take each other for strangers otherwise")


class SeenNonces:
    """Nonces of the proofs that were taken, until their time is over. Bounded: see `add`."""

    def __init__(self, limit: int = NONCES_LIMIT) -> None:
        self._limit = limit
        self._slices: dict[int, set[bytes]] = {}  # by time
        self._count = 0
        self._floor_ms = 0  # what is older was forgotten

    def add(self, proof: rules.Proof, now_ms: int) -> bool:
        """Whether this proof comes for the first time.

        When there are too many, the oldest are forgotten, and from then on nothing as old as they is taken: a flood by a
        member may cost those whose clocks are behind some requests, but never lets a replay through.
        """
        self._forget_expired(now_ms)
        if proof.time_ms < self._floor_ms:
            return False
        seen = self._slices.setdefault(proof.time_ms // _SLICE_MS, set())
        if proof.nonce in seen:
            return False
        seen.add(proof.nonce)
        self._count += 1
        while self._count > self._limit:
            self._drop(min(self._slices))
        return True

    def _forget_expired(self, now_ms: int) -> None:
        first = (now_ms - rules.MAX_SKEW_MS) // _SLICE_MS
        for number in [number for number in self._slices if number < first]:
            self._drop(number)

    def _drop(self, number: int) -> None:
        self._count -= len(self._slices.pop(number))
        self._floor_ms = max(self._floor_ms, (number + 1) * _SLICE_MS)
