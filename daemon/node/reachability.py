"""Whether others can reach this node from outside: found by being dialled back, never assumed.

    unknown   nobody has said yet
    public    most of those whom we asked reached us, or somebody outside came to us by himself
    private   they could not reach us: we are behind a NAT or a firewall

Each round of questions stands for itself: what most say counts, and of a tie, what was before. The nodes that a person joined are
asked first. What we saw ourselves, somebody who came straight in, counts more than any word, until our address changes.
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

    def look_again(self) -> None:
        """Something is different: ask soon."""
        self._look.set()

    def came(self, address: str, part: str) -> None:
        """Somebody outside came straight to `part` of us from `address`. That is proof without anybody's word."""
        # Our own address is an IPv4 one: who came over IPv6 says nothing about it.
        stranger = ranges.allows("public", address) and ":" not in address
        if not stranger or address in own_addresses() or part in self._witnessed:
            return
        if (ours := global_address()) is not None:
            self._settle(ours, self._told, self._witnessed | {part})

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

    async def _ask_some(self) -> list[tuple[dialback.Verdict, int | None]]:
        asked = self._judges()[:ASKED]
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
        said = [verdict for verdict, _ in verdicts]
        # Of addresses that equally many saw, that of the first, who was joined by a person if any was.
        address = str(Counter(verdict.address for verdict in said).most_common(1)[0][0])
        self.nat = _nat(verdicts, self.nat)
        told = frozenset(part for part in dialback.PARTS if self._most_reached(part, said))
        kept = self._witnessed if self.external[:1] == (address,) else frozenset[str]()
        self._settle(address, told, kept)

    def _most_reached(self, part: str, said: Sequence[dialback.Verdict]) -> bool:
        reached = sum(part in verdict.reached for verdict in said)
        if 2 * reached == len(said):
            return part in self._told
        return 2 * reached > len(said)

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


def _nat(verdicts: Sequence[tuple[dialback.Verdict, int | None]], before: Nat) -> Nat:
    """What the NAT does with ports, as far as those show it who saw a plain connection."""
    own = own_addresses()
    if any(verdict.address in own for verdict, _ in verdicts):
        return "none"
    seen = [(verdict.port, port) for verdict, port in verdicts if verdict.port and port]
    if not seen:
        return before
    return "port-preserving" if all(outside == inside for outside, inside in seen) else "symmetric"
