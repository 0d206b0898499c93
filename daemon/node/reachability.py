"""Whether others can reach this node from outside: found by being dialled back, never assumed.

    unknown   nobody has said yet
    public    most of those whom we asked reached us, or somebody outside came to us by himself
    private   they could not reach us: we are behind a NAT or a firewall

Each round of questions stands for itself: what most say counts, and of a tie, what was before. The nodes that a person joined are
asked first. What we saw ourselves, somebody who came straight in, counts more than any word. All of it counts for the address that
it was said about, and until we have another.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from daemon.errors import SwarmError
from daemon.membership import Membership
from daemon.network import global_address, own_addresses
from daemon.peerapi import dialback
from daemon.peerapi.ways import NEVER, Ways
from registry import ranges
from registry.records import Peer

_log = logging.getLogger(__name__)

State = Literal["public", "private", "unknown"]
Nat = Literal["none", "port-preserving", "symmetric", "unknown"]

ASKED = 3  # nodes asked at a time
MOST_ASKED = 12  # in a row, until one has an opinion
_AGAIN_S = 600.0  # after a verdict
_RETRY_S = 5.0  # while there is none, and at first while the kind of NAT is not known
_SETTLE_S = 0.02  # several reasons to look again are one


class Reachability:
    """`own` is our node key, `ports` our ports by part (see dialback.py), `judges` gives nodes that can be asked, best first."""

    def __init__(
        self,
        own: str,
        ways: Ways,
        membership: Membership,
        *,
        ports: Callable[[], Mapping[str, int]],
        judges: Callable[[], Sequence[Peer]],
        on_change: Callable[[], None],
    ) -> None:
        self.state: State = "unknown"
        self._told: frozenset[str] = frozenset()  # our parts that most of those who were asked reached
        self._witnessed: frozenset[str] = frozenset()  # and those to which somebody came
        self.external: tuple[str, ...] = ()  # our addresses as others see them, the newest first
        self.nat: Nat = "unknown"
        self._own = own
        self._ways = ways
        self._membership = membership
        self._ports = ports
        self._judges = judges
        self._on_change = on_change
        self._look = asyncio.Event()

    @property
    def reached(self) -> frozenset[str]:
        """Our parts that somebody outside reached."""
        return self._told | self._witnessed

    def ipfs_is_public(self) -> bool:
        """Whether strangers can dial our IPFS node.

        Before anybody has reached it, that of a machine with an address of its own on the internet is taken as one that can be
        reached: if that is wrong, nobody comes who could be disappointed. Any other is taken as one behind a NAT.
        """
        if self.state == "private":
            return False
        return "ipfs" in self.reached or global_address() is not None

    def look_again(self) -> None:
        """Something is different: ask soon."""
        self._look.set()

    def came(self, address: str, part: str) -> None:
        """Somebody outside came straight to `part` of us from `address`. That is proof without anybody's word."""
        # Our own address is an IPv4 one: who came over IPv6 says nothing about it.
        stranger = ranges.allows("public", address) and ":" not in address
        if not stranger or address in own_addresses():
            return
        ours = self._global_address()
        if ours is not None:
            told, witnessed = self._known_at(ours)
            self._settle(ours, told, witnessed | {part})

    async def run(self) -> None:
        """Ask now and then, and whenever there is a reason to. Supervised."""
        unsure_s = _RETRY_S
        while True:
            self._look.clear()
            verdicts = await self._ask_some()
            if verdicts:
                self._judge(verdicts)
            wait_s = _AGAIN_S if verdicts else _RETRY_S
            if verdicts and self.nat == "unknown":
                # Those who answer may announce a URL later, and only a plain connection shows the kind.
                wait_s, unsure_s = unsure_s, min(2 * unsure_s, _AGAIN_S)
            try:
                async with asyncio.timeout(wait_s):
                    await self._look.wait()
            except TimeoutError:
                continue
            await asyncio.sleep(_SETTLE_S)

    def _global_address(self) -> str | None:
        """An address of this machine on the internet: of several the one that others see."""
        seen = self.external[:1]
        if seen and seen[0] in own_addresses() and ranges.allows("public", seen[0]):
            return seen[0]
        return global_address()

    def _known_at(self, address: str) -> tuple[frozenset[str], frozenset[str]]:
        """What was told and witnessed while `address` was ours, as it still is."""
        ours = self.external[:1] == (address,)
        return (self._told, self._witnessed) if ours else (frozenset(), frozenset())

    async def _ask_some(self) -> list[tuple[dialback.Verdict, int | None]]:
        """The verdicts of the first few of whom one has an opinion: those who are gone must not stand before all others."""
        judges = self._judges()[:MOST_ASKED]
        for start in range(0, len(judges), ASKED):
            verdicts = await self._verdicts(judges[start : start + ASKED])
            if verdicts or self._look.is_set():  # somebody better may have been joined meanwhile
                return verdicts
        return []

    async def _verdicts(
        self, asked: Sequence[Peer]
    ) -> list[tuple[dialback.Verdict, int | None]]:
        results = await asyncio.gather(*(self._ask(peer) for peer in asked), return_exceptions=True)
        verdicts: list[tuple[dialback.Verdict, int | None]] = []
        for result in results:
            if isinstance(result, tuple):
                verdicts.append(result)
            elif not isinstance(result, SwarmError):
                raise result
        # Whoever cannot see where we come from, or says that it is no place on the internet, has no opinion.
        return [
            (verdict, port)
            for verdict, port in verdicts
            if verdict.address is not None and ranges.allows("public", verdict.address)
        ]

    async def _ask(self, peer: Peer) -> tuple[dialback.Verdict, int | None]:
        if peer.address.http and peer.peer_id is not None:
            # A plain connection shows what our NAT does with ports, which one through IPFS does not.
            try:
                return await self._ask_over(replace(peer, peer_id=None))
            except SwarmError as error:
                _log.debug("no plain connection to a node that announces a URL: %s", error)
        return await self._ask_over(peer)

    async def _ask_over(self, peer: Peer) -> tuple[dialback.Verdict, int | None]:
        async with self._ways.to(peer, via=NEVER) as way:
            return await dialback.ask(
                way, self._own, self._ports(), membership=self._membership
            )

    def _judge(self, verdicts: Sequence[tuple[dialback.Verdict, int | None]]) -> None:
        """Of addresses that equally many saw, the one that we had, else that of the first, whom a person joined if anybody was."""
        seen = Counter(str(verdict.address) for verdict, _ in verdicts)
        most = max(seen.values())
        agreed = [address for address, count in seen.items() if count == most]
        address = next((one for one in agreed if one in self.external[:1]), agreed[0])
        self.nat = _nat(verdicts, self.nat)
        about_it = [verdict for verdict, _ in verdicts if verdict.address == address]
        before, witnessed = self._known_at(address)
        told = frozenset(part for part in dialback.PARTS if _most_reached(part, about_it, before))
        self._settle(address, told, witnessed)

    def _settle(self, address: str, told: frozenset[str], witnessed: frozenset[str]) -> None:
        before = (self.state, self.reached, self.external)
        others = [one for one in self.external if one != address]
        self.external = (address, *others)[:4]
        self._told, self._witnessed = told, witnessed
        self.state = "public" if self.reached else "private"
        if (self.state, self.reached, self.external) != before:
            parts = ", ".join(sorted(self.reached)) or "nothing"
            _log.info("reachability: %s (%s)", self.state, parts)
            self._on_change()


def _most_reached(part: str, said: Sequence[dialback.Verdict], before: frozenset[str]) -> bool:
    """Whether most reached that part of us; of a tie, whether it was reached `before`."""
    reached = sum(part in verdict.reached for verdict in said)
    return part in before if 2 * reached == len(said) else 2 * reached > len(said)


def _nat(verdicts: Sequence[tuple[dialback.Verdict, int | None]], before: Nat) -> Nat:
    """What the NAT does with ports, as far as those show it who saw a plain connection."""
    own = own_addresses()
    if any(verdict.address in own for verdict, _ in verdicts):
        return "none"
    seen = [(verdict.port, port) for verdict, port in verdicts if verdict.port and port]
    if not seen:
        return before
    return "port-preserving" if all(outside == inside for outside, inside in seen) else "symmetric"
