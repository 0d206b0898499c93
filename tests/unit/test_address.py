from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry import endpoints
from registry.address import format_address, parse_address
from registry.endpoints import MAX_ENDPOINTS
from registry.errors import Malformed
from registry.records import Address
from tests.unit import strategies
from tests.unit.strategies import PEER_ID

NODE = "ed25519:03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8"
BARE = NODE.replace("ed25519:", "swarmctl://")


@given(st.data())
def test_addresses_round_trip(data: st.DataObject) -> None:
    address = data.draw(strategies.nodes.flatmap(strategies.addresses))
    text = format_address(address)
    assert parse_address(text) == address
    assert shlex.quote(text) == text and not set(text) & set("?&")


def test_the_form_is_the_one_promised() -> None:
    address = Address(NODE, (f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER_ID}",), ("[::1]:6881",), ("http://127.0.0.1:9000",))
    text = f"{BARE}/ipfs=/ip4/127.0.0.1/tcp/4001/p2p/{PEER_ID},bt=%5B::1%5D:6881,http=http://127.0.0.1:9000"
    assert format_address(address) == text
    assert parse_address(f" {text}\n") == address
    assert parse_address(text.replace("/ipfs=", "?ipfs=").replace(",", "&")) == address


def test_a_bare_multiaddr_is_an_address_without_a_key() -> None:
    assert parse_address(f"/dns4/example.org/tcp/4001/p2p/{PEER_ID}") == Address("", (f"/dns4/example.org/tcp/4001/p2p/{PEER_ID}",))


def test_only_so_many_endpoints_are_written() -> None:
    many = Address(NODE, bittorrent=tuple(f"h:{i}" for i in range(1, 100)))
    assert parse_address(format_address(many)).bittorrent == many.bittorrent[:MAX_ENDPOINTS]


BAD = [
    "", "http://example.org", "swarmctl://", "swarmctl://ab", "swarmctl://" + "00" * 32,
    "swarmctl://" + "g" * 64, BARE + "?x=1", BARE + "?bt",
    BARE + "?bt=", BARE + "?bt=a:1&bt=a:1", BARE + "?bt=%zz:1", BARE + "?bt=a+b:1", BARE + "?http=http://user@h/", BARE + "?http=ftp://h/",
    BARE + "?http=http://h/?q", BARE + "/http=http://h/?q", BARE + "/?bt=h:1", BARE + "/bt=h:1,", BARE + "//bt=h:1",
    BARE + "?http=http://h/../..", BARE + "?ipfs=/ip4/127.0.0.1/tcp/4001", BARE + "?bt=%ff:1",
    BARE + "?" + "&".join(f"bt=h:{i}" for i in range(1, MAX_ENDPOINTS + 2)), BARE + "?bt=h:1" + "&" * 9000, "/ip4/127.0.0.1/tcp/1",
    "/unix/x/p2p/" + PEER_ID,
]  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_address_is_malformed(text: str) -> None:
    with pytest.raises(Malformed):
        parse_address(text)


@pytest.mark.parametrize(
    ("text", "spelling"),
    [
        ("127.0.0.1:1", "127.0.0.1:1"), ("LocalHost:65535", "localhost:65535"), ("[::0001]:80", "[::1]:80"), ("xn--e1afmkfd.org:80",
        "xn--e1afmkfd.org:80"),
    ],
)  # fmt: skip
def test_host_and_port_have_one_spelling(text: str, spelling: str) -> None:
    assert endpoints.host_port(text) == spelling


@pytest.mark.parametrize(
    "text",
    [
        "", ":", ":80", "a", "a:", "a:0", "a:65536", "a:-1", "a:+1", "a:01", "a:\u0661", "a:1e3", "::1:80", "[::1]", "[127.0.0.1]:80",
        "a b:80", "a..b:80",
        "-a:80", "a-:80", "a_b:80", "127.1:80", "0x7f000001:80", "0x7f.1:80", "2130706433:80", "0177.0.0.1:80", "256.0.0.1:80",
        "[fe80::1%eth0]:80",
        "a" * 64 + ":80", "a." * 127 + "a:80", "\u212a.org:80", "a/b:80", "a@b:80", "a\n:80",
    ],
)  # fmt: skip
def test_what_is_no_host_and_port_is_malformed(text: str) -> None:
    with pytest.raises(Malformed):
        endpoints.host_port(text)


# As `ipfs id` of Kubo 0.43.0 prints them.
@pytest.mark.parametrize(
    "text",
    [
        f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER_ID}",
        f"/ip4/192.168.1.2/udp/4001/quic-v1/webtransport/certhash/uEiDgW/certhash/uEiC_-9/p2p/{PEER_ID}",
        f"/ip6/::1/udp/4001/webrtc-direct/certhash/uEiAOx/p2p/{PEER_ID}",
        f"/ip4/1.2.3.4/tcp/4001/tls/sni/1-2-3-4.k51qzi5uqu5d.libp2p.direct/ws/p2p/{PEER_ID}",
        f"/ip4/1.2.3.4/tcp/4001/p2p/QmaCpDMGvV2BGHeYERUEnRQAwe3N8SzbUtfsmvsqQLuvuJ/p2p-circuit/p2p/{PEER_ID}",
        f"/dnsaddr/bootstrap.libp2p.io/p2p/{PEER_ID}",
    ],
)
def test_the_multiaddrs_of_kubo_are_taken(text: str) -> None:
    assert endpoints.multiaddr(text) == text
    assert endpoints.peer_of(text) == PEER_ID


@pytest.mark.parametrize(
    "text",
    [
        "", "/", f"/p2p/{PEER_ID}", "/ip4/127.0.0.1/tcp/4001/p2p/x", f"ip4/127.0.0.1/tcp/1/p2p/{PEER_ID}",
        f"/ip4/127.1/tcp/1/p2p/{PEER_ID}",
        f"/ip4/::1/tcp/1/p2p/{PEER_ID}", f"/ip4/127.0.0.1/tcp/0/p2p/{PEER_ID}", f"/ip4/127.0.0.1/tcp/99999/p2p/{PEER_ID}",
        f"/ip4/127.0.0.1//p2p/{PEER_ID}",
        f"/ip4/127.0.0.1/tcp/1/p2p/{PEER_ID}/", f"/ip4/127.0.0.1/tcp/1/p2p/{PEER_ID}/x", f"/ip4/127.0.0.1/tcp/1/x y/p2p/{PEER_ID}",
        f"/ip6/fe80::1%eth0/tcp/1/p2p/{PEER_ID}", f"/unix/tmp/x/p2p/{PEER_ID}", f"/ip4/127.0.0.1/tcp/1{'/ws' * 90}/p2p/{PEER_ID}",
    ],
)  # fmt: skip
def test_what_is_no_multiaddr_is_malformed(text: str) -> None:
    with pytest.raises(Malformed):
        endpoints.multiaddr(text)


@given(st.text(max_size=120))
def test_any_text_parses_or_is_malformed(text: str) -> None:
    for parse in (parse_address, endpoints.host_port, endpoints.http_url, endpoints.multiaddr):
        for candidate in (text, f"{BARE}?bt={text}", f"http://{text}", f"/ip4/{text}/p2p/{PEER_ID}"):
            try:
                parse(candidate)
            except Malformed:
                pass
