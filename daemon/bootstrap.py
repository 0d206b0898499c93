"""By whom a public node enters the IPFS network when it knows nobody: the setting `ipfs.bootstrap` and its default.

Nothing here is needed: good peers are remembered and tried first, and nodes that were joined are enough.
"""

from __future__ import annotations

from collections.abc import Sequence

from daemon.errors import UsageError
from registry import endpoints
from registry.errors import Malformed

MAX_BOOTSTRAP = 64  # entries of the setting

# The classic public list, as boxo's autoconf/fallbacks.go has it. Nobody promises that these hosts live on.
PUBLIC_BOOTSTRAP = (
    "/dnsaddr/bootstrap.libp2p.io/p2p/QmNnooDu7bfjPFoTZYxMNLWUQJyrVwtbZg5gBMjTezGAJN",
    "/dnsaddr/bootstrap.libp2p.io/p2p/QmQCU2EcMqAqQPR2i9bChDtGNJchTbq5TbXJJ16u19uLTa",
    "/dnsaddr/bootstrap.libp2p.io/p2p/QmbLHAnMoJPWSCR5Zhtx6BHJX9KiKNN6tpvbUcqanj75Nb",
    "/dnsaddr/bootstrap.libp2p.io/p2p/QmcZf59bWwK5XFi76CZX8cbJ4BhTzzA3gU1ZjYZcYW3dwt",
    "/dnsaddr/va1.bootstrap.libp2p.io/p2p/12D3KooWKnDdG3iXw9eTFijk3EWSunZcFi54Zka4wmtqtt6rPxc8",
    "/ip4/104.131.131.82/tcp/4001/p2p/QmaCpDMGvV2BGHeYERUEnRQAwe3N8SzbUtfsmvsqQLuvuJ",
    "/ip4/104.131.131.82/udp/4001/quic-v1/p2p/QmaCpDMGvV2BGHeYERUEnRQAwe3N8SzbUtfsmvsqQLuvuJ",
)


def check_bootstrap(entries: Sequence[str]) -> None:
    """Raises `UsageError` for the first entry that is no multiaddr with a peer id at its end."""
    if len(entries) > MAX_BOOTSTRAP:
        raise UsageError(
            "ipfs.bootstrap", f"{len(entries)} entries are too many", f"give at most {MAX_BOOTSTRAP}"
        )
    for entry in entries:
        try:
            endpoints.multiaddr(entry)
        except Malformed as error:
            hint = "give multiaddrs such as /ip4/ADDRESS/tcp/4001/p2p/ID; an empty list for none"
            raise UsageError("ipfs.bootstrap", str(error), hint) from error
