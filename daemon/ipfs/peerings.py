"""The peers that an IPFS node is told to hold on to. The list outlives the node: the next one gets it."""

from __future__ import annotations

from collections import OrderedDict

MAX_PEERINGS = 64


class Peerings:
    """Multiaddrs that end in /p2p/ID, one for each peer, the longest unasked-for first; at most `MAX_PEERINGS`."""

    def __init__(self) -> None:
        self._addresses: OrderedDict[str, str] = OrderedDict()

    def add(self, multiaddr: str) -> str | None:
        """Hold on to this peer too. Returns the id of the peer that has to be let go for it, if any."""
        peer = multiaddr.rpartition("/p2p/")[2]
        self._addresses[peer] = multiaddr
        self._addresses.move_to_end(peer)
        if len(self._addresses) <= MAX_PEERINGS:
            return None
        oldest, _ = self._addresses.popitem(last=False)
        return oldest

    def addresses(self) -> tuple[str, ...]:
        return tuple(self._addresses.values())
