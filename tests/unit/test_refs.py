from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.errors import Malformed
from registry.manifest import display_name
from registry.refs import CidRef, CodeRef, HfRef, MagnetRef, NameRef, PathRef, Ref, UrlRef, magnet, parse_ref
from tests.unit import strategies

CID = "bafybeihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku"
V0 = "QmdfTbBqBPQ7VNxZEYEj14VmRuZBkqFbiwReogJgS1zR1n"
V1, V2 = "ab" * 20, "cd" * 32

GOOD: dict[str, Ref] = {
    "#abc2def": CodeRef("abc2def"),
    "#ABC2DEF": CodeRef("abc2def"),
    "abc2def": CodeRef("abc2def", "abc2def"),
    "SmolLM2": CodeRef("smollm2", "SmolLM2"),
    "b" * 52: CodeRef("b" * 52, "b" * 52),
    "baf" + "b" * 49: CodeRef("baf" + "b" * 49, "baf" + "b" * 49),
    CID: CidRef(CID),
    V0: CidRef(CID),
    f"ipfs://{V0}/": CidRef(CID),
    f"IPFS://{CID}": CidRef(CID),
    f"/ipfs/{CID}": CidRef(CID),
    f"  {CID}\n": CidRef(CID),
    V1.upper(): MagnetRef(V1, None),
    f"magnet:?xt=urn:btih:{V1}": MagnetRef(V1, None),
    f"magnet:?xt=urn:btih:{'VOV2XK5L' * 4}": MagnetRef(V1, None),
    f"magnet:?xt=urn:btmh:1220{V2.upper()}": MagnetRef(None, V2),
    f"magnet:?xt.1=urn:btih:{V1}&xt.2=urn:btmh:1220{V2}&dn=a%20b&xl=5&x.pe=10.0.0.1:6881": MagnetRef(V1, V2, "a b", ("10.0.0.1:6881",), 5),
    f"magnet:?xt=urn:btih:{V1}&x.pe=[::1]:1&x.pe=host.local:2&x.pe=[0::1]:1": MagnetRef(V1, None, None, ("[::1]:1", "host.local:2")),
    f"magnet:?xt=urn:btih:{V1}&xt=urn:sha1:YNCKHTQCWBTRNJIV4WNAE52SJUQCZO5C": MagnetRef(V1, None),
    f"magnet:?xt=urn:btih:{V1}&dn=..%2F..%2Fevil%1b[2J": MagnetRef(V1, None, "..-..-evil[2J"),
    "hf:owner/repo": HfRef("owner/repo"),
    "hf:HuggingFaceTB/SmolLM2-135M-Instruct-GGUF:Q4_K_M": HfRef("HuggingFaceTB/SmolLM2-135M-Instruct-GGUF", "Q4_K_M"),
    "https://example.org/a.gguf?download=true": UrlRef("https://example.org/a.gguf?download=true"),
    "/models/a.gguf": PathRef("/models/a.gguf"),
    "./a.gguf": PathRef("./a.gguf"),
    "../a b.gguf": PathRef("../a b.gguf"),
    "~/a.gguf": PathRef("~/a.gguf"),
    "file:///models/a%20b.gguf": PathRef("/models/a b.gguf"),
    "file://localhost/a": PathRef("/a"),
    "qwen-3b": NameRef("qwen-3b"),
    "SmolLM2-135M-Instruct.Q4_1": NameRef("SmolLM2-135M-Instruct.Q4_1"),
    "cafe\u0301": NameRef("caf\u00e9"),
    "0" * 64: NameRef("0" * 64),
}


@pytest.mark.parametrize(("text", "ref"), GOOD.items())
def test_what_is_typed_is_read_by_its_form(text: str, ref: Ref) -> None:
    assert parse_ref(text) == ref


def test_web_seeds_trackers_and_sources_in_a_magnet_are_dropped() -> None:
    link = f"magnet:?xt=urn:btih:{V1}"
    for bad in (
        "ws=http://169.254.169.254/", "ws=http://127.0.0.1:5001/api/v0/id", "ws=file:///etc/passwd",
        "tr=udp://tracker.example.org:1337", "tr.1=http://127.0.0.1/", "xs=http://10.0.0.1/x.torrent", "as=http://10.0.0.1/x",
    ):  # fmt: skip
        assert parse_ref(f"{link}&{bad}") == MagnetRef(V1, None)


BAD = [
    "", "  ", "a\x00b", "x" * 5000, "#abc", "#abc1def", "#../../etc", "#" + "a" * 53,
    CID[:-1], CID + "a", CID[:-1] + "1", "Qm" + "0" * 44, f"ipfs://{CID}/../x", f"ipfs://{CID}/model.gguf", "ipfs://", "ipfs://../x",
    f"/ipfs/{CID}/x",
    "magnet:", "magnet:?", "magnet:?dn=x", "magnet:?xt=urn:btih:", "magnet:?xt=urn:btih:" + "g" * 40, "magnet:?xt=urn:btmh:" + V2,
    "magnet:?xt=urn:btmh:1220" + V2 + "00", f"magnet:?xt=urn:btih:{V1}&xt=urn:btih:{'00' * 20}", f"magnet:?xt=urn:btih:{V1}&xl=-1",
    f"magnet:?xt=urn:btih:{V1}&xl=99999999999999999999", f"magnet:?xt=urn:btih:{V1}&xl=0", f"magnet:?xt=urn:btih:{V1}&x.pe=127.0.0.1",
    f"magnet:?xt=urn:btih:{V1}&x.pe=0x7f000001:1", f"magnet:?xt=urn:btih:{V1}&x.pe=127.1:1", f"magnet:?xt=urn:btih:{V1}&dn=%ff",
    f"magnet:?xt=urn:btih:{V1}" + "&a=b" * 70, f"magnet:?xt=urn:btih:{V1}" + "".join(f"&x.pe=h:{i}" for i in range(1, 19)),
    f"magnet:?xt=urn:btih:{V1}&x.mf=", f"magnet:?xt=urn:btih:{V1}&x.mf={V2}", f"magnet:?xt=urn:btih:{V1}&x.mf={'g' * 40}",
    f"magnet:?xt=urn:btih:{V1}&x.mf={V1}&x.mf={'00' * 20}",
    "hf:", "hf:owner", "hf:../repo", "hf:owner/..", "hf:owner/re..po", "hf:a/b/c", "hf:a/b:", "hf:a/b:c/d",
    "ftp://example.org/a", "http://", "http://a\\@b/", "http://user:pw@example.org/", "http://a b/", "http://127.1/", "http://0x7f000001/",
    "http://2130706433/", "http://0177.0.0.1/", "http://[::1", "http://a:99999/", "http://a:/", "http://exa\u043cple.org/",
    "https://a/#x", "http://[fe80::1%25eth0]/",
    "file://server/share", "file:relative", "file:///a%00", "file:///a?b", "swarmctl://" + "ab" * 32,
    "a/b", "a\\b", "\u202egnp.exe", "zero\u200bwidth", "\x1b[2J", "two\nlines", "...", "n" * 121,
]  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_reference_is_malformed_and_says_why(text: str) -> None:
    with pytest.raises(Malformed) as caught:
        parse_ref(text)
    assert str(caught.value).isascii() and len(str(caught.value)) < 200


@given(
    strategies.hexes(40) | st.none(),
    strategies.hexes(64),
    strategies.names,
    strategies.sizes | st.none(),
    strategies.hexes(40) | st.none(),
)
def test_our_magnets_round_trip(
    infohash: str | None, infohash_v2: str, name: str, size: int | None, manifest: str | None
) -> None:
    link = magnet(infohash, infohash_v2, name, size, manifest)
    assert parse_ref(link) == MagnetRef(infohash, infohash_v2, name, (), size, manifest)
    assert link.isascii() and " " not in link


def test_the_manifest_of_a_magnet_may_be_said_twice_and_in_capitals() -> None:
    link = f"magnet:?xt=urn:btih:{V1}&x.mf={V1.upper()}&x.mf={V1}&x.other=1"
    assert parse_ref(link) == MagnetRef(V1, None, manifest=V1)


def test_a_magnet_needs_an_infohash() -> None:
    with pytest.raises(Malformed):
        magnet(None, None, "x", 1)


@given(strategies.names)
def test_every_display_name_can_be_typed_or_is_something_else(name: str) -> None:
    try:
        ref = parse_ref(name)
    except Malformed:
        assert name[0] == "#" or ":" in name
    else:
        assert not isinstance(ref, NameRef) or ref.name == name == display_name(name)


@given(st.text(max_size=300))
def test_any_text_parses_or_is_malformed(text: str) -> None:
    try:
        parse_ref(text)
    except Malformed:
        pass
