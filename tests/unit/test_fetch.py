"""Where a download sends IPFS: to whom the holders name, as far as the network lets them lead."""

from __future__ import annotations

import pytest

from daemon.transfer.fetch import addresses_to_dial
from registry.multiaddrs import Network
from registry.records import Address, Peer

ID = "12D3KooWQYhTNQdmr3ArTeUHRYzFg94BKyTkoWBDWez9kSCVe2Xo"
OTHER = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
OUTSIDE = f"/ip4/60.1.2.3/tcp/4001/p2p/{ID}"
ROUTER = f"/ip4/192.168.1.1/tcp/80/p2p/{ID}"
ITSELF = f"/ip4/127.0.0.1/tcp/5001/p2p/{ID}"
THROUGH = f"/ip4/10.0.0.1/tcp/4001/p2p/{OTHER}/p2p-circuit/p2p/{ID}"
BY_NAME = f"/dns4/example.org/tcp/4001/p2p/{ID}"


def holder(*addresses: str) -> Peer:
    return Peer("a", ID, Address("a", ipfs=addresses), 1, 1)


@pytest.mark.parametrize(
    ("network", "dialled"),
    [("public", [OUTSIDE]), ("lan", [ROUTER, ITSELF, THROUGH]), ("loopback", [ITSELF])],
)
def test_no_holder_sends_ipfs_where_the_network_does_not_lead(
    network: Network, dialled: list[str]
) -> None:
    said = holder(OUTSIDE, ROUTER, ITSELF, THROUGH, BY_NAME)
    assert addresses_to_dial([said, said], set(), network) == dialled


def test_who_is_connected_is_not_dialled_again() -> None:
    assert addresses_to_dial([holder(OUTSIDE)], {ID}, "public") == []
