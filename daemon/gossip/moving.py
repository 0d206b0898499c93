"""A node that moves to another swarm leaves behind whom it knew in the last one, and neither swarm hears of the other."""

from __future__ import annotations

from daemon.gossip.joining import JOINED
from daemon.ledger import LedgerThread
from daemon.membership import Membership
from registry.announcement import MAX_SEQUENCE
from registry.store import Ledger

_SWARM = "swarm.fingerprint"


async def settle(ledger: LedgerThread, membership: Membership) -> None:
    """Forget peers, offers and joined addresses unless they are of this swarm. Before the peer table is opened."""
    if await ledger.call(Ledger.get_meta, _SWARM) == membership.fingerprint:
        return
    await ledger.call(Ledger.forget_peers, MAX_SEQUENCE + 1)  # later than any that was accepted
    await ledger.call(Ledger.set_meta, JOINED, "[]")
    await ledger.call(Ledger.set_meta, _SWARM, membership.fingerprint)
