"""Whether others can reach this node from outside: found by being dialled back, never assumed.

    unknown   nobody has said yet
    public    somebody outside reached us, or came to us by himself
    private   those whom we asked could not reach us: we are behind a NAT or a firewall

A verdict counts for as long as our address stays the same, and for that address alone. One node that reached us is enough: the
worst that a liar can do is to have us announce an address at which we are then not found, and whoever tries it tries our relays,
too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
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
_RETRY_S = 5.0  # while there is none
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
        self.reached: frozenset[str] = frozenset()  # our parts that somebody outside reached
        self.external: tuple[str, ...] = ()  # our addresses as others see them, the newest first
        self.nat: Nat = "unknown"
        self._own = own
        self._ways = ways
        self._membership = membership
        self._ports = ports
        self._judges = judges
        self._on_change = on_change
        self._look = asyncio.Event()

    def look_again(self) -> None:
        """Something is different: ask soon."""
        self._look.set()

    def came(self, address: str, part: str) -> None:
        """Somebody outside came straight to `part` of us from `address`. That is proof without anybody's word."""
        if not ranges.allows("public", address) or address in own_addresses():
            return
        ours = self._global_address()
        if ours is not None and part not in self._proven_at(ours):
            self._settle("public", self._proven_at(ours) | {part}, ours)

    async def run(self) -> None:
        """Ask now and then, and whenever there is a reason to. Supervised."""
        while True:
            self._look.clear()
            verdicts = await self._ask_some()
            if verdicts:
                self._judge(verdicts)
            wait_s = _AGAIN_S if verdicts else _RETRY_S
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

    def _proven_at(self, address: str) -> frozenset[str]:
        """Our parts that were reached while `address` was ours, as it still is."""
        return self.reached if self.external[:1] == (address,) else frozenset()

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
        # Whoever cannot see where we come from has no opinion.
        return [(verdict, port) for verdict, port in verdicts if verdict.address is not None]

    async def _ask(self, peer: Peer) -> tuple[dialback.Verdict, int | None]:
        async with self._ways.to(peer, via=NEVER) as way:
            return await dialback.ask(
                way, self._own, self._ports(), membership=self._membership
            )

    def _judge(self, verdicts: Sequence[tuple[dialback.Verdict, int | None]]) -> None:
        reached_at: dict[str, frozenset[str]] = {}
        for verdict, _ in verdicts:
            address = str(verdict.address)
            reached_at[address] = reached_at.get(address, frozenset()) | verdict.reached
        # Where they do not agree: the address at which most was reached, then the one that we had.
        address = max(reached_at, key=lambda one: (len(reached_at[one]), one in self.external[:1]))
        self.nat = _nat(verdicts, self.nat)
        # What came by itself from outside is better evidence than what these few could reach.
        reached = reached_at[address] | self._proven_at(address)
        self._settle("public" if reached else "private", reached, address)

    def _settle(self, state: State, reached: frozenset[str], address: str) -> None:
        before = (self.state, self.reached, self.external)
        others = [one for one in self.external if one != address]
        self.external = (address, *others)[:4]
        self.state, self.reached = state, reached
        if (self.state, self.reached, self.external) != before:
            _log.info("reachability: %s (%s)", state, ", ".join(sorted(reached)) or "nothing")
            self._on_change()


def _nat(verdicts: Sequence[tuple[dialback.Verdict, int | None]], before: Nat) -> Nat:
    """What the NAT does with ports, as far as those show it who saw a plain connection."""
    own = own_addresses()
    if any(verdict.address in own for verdict, _ in verdicts):
        return "none"
    seen = [(verdict.port, port) for verdict, port in verdicts if verdict.port and port]
    if not seen:
        return before
    return "port-preserving" if all(outside == inside for outside, inside in seen) else "symmetric"
