"""Hypothesis strategies for the records that travel between nodes; every value is one that the parsers accept."""

from __future__ import annotations

from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import strategies as st

from daemon.engine.interface import (
    Candidate,
    ChatRequest,
    CompletionRequest,
    Delta,
    EmbeddingRequest,
    Sampling,
    TokenLogprob,
    Tool,
    ToolCallDelta,
    Usage,
)
from registry.cid import Cid
from registry.envelope import key_name
from registry.errors import Malformed
from registry.manifest import MAX_SIZE, Manifest, display_name
from registry.records import Address, GgufFacts, Identity, Offer, SealKey

PEER_ID = "12D3KooWGC6TvWhfapngX6wvJHMYvKpDMXPb3ZnCZ6dMoaMtimQ5"
RELAY = "QmaCpDMGvV2BGHeYERUEnRQAwe3N8SzbUtfsmvsqQLuvuJ"


def hexes(length: int) -> st.SearchStrategy[str]:
    return st.binary(min_size=length // 2, max_size=length // 2).map(bytes.hex)


def cleaned(text: str) -> str | None:
    try:
        return display_name(text)
    except Malformed:
        return None


cids = st.builds(Cid, st.sampled_from(["raw", "dag-pb"]), st.binary(min_size=32, max_size=32)).map(str)
names: st.SearchStrategy[Any] = st.text(min_size=1, max_size=40).map(cleaned).filter(lambda name: name is not None)
maybe_names = st.none() | names
keys = st.binary(min_size=32, max_size=32).map(Ed25519PrivateKey.from_private_bytes)
nodes = keys.map(key_name)
sizes = st.integers(1, MAX_SIZE)

identities = st.builds(Identity, size=sizes, blake3=hexes(64), sha256=hexes(64), cid=cids, infohash=hexes(40), infohash_v2=hexes(64))
facts = st.builds(
    GgufFacts,
    architecture=names,
    name=maybe_names,
    quantization=maybe_names,
    parameters=st.none() | st.integers(0, 10**12),
    context_length=st.none() | st.integers(0, 10**6),
    chat_template_hash=st.none() | hexes(64),
    license=maybe_names,
)
manifests = st.builds(
    Manifest,
    identity=identities,
    name=names,
    facts=facts,
    torrent=st.none() | cids,
    source=st.none() | st.just("https://example.org/model.gguf?download=true"),
    created=st.just("2026-11-21T12:00:00Z"),
)

ports = st.integers(1, 65535).map(str)
hosts = st.one_of(
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(lambda ip: f"[{ip}]"),
    st.sampled_from(["localhost", "nas.local", "a-1.example.org"]),
)
host_ports = st.builds("{}:{}".format, hosts, ports)
base_urls = st.builds("{}://{}{}".format, st.sampled_from(["http", "https"]), host_ports, st.sampled_from(["", "/swarm", "/a/b"]))
multiaddrs = st.one_of(
    st.builds("/ip4/{}/tcp/{}/p2p/{}".format, st.ip_addresses(v=4), ports, st.just(PEER_ID)),
    st.builds("/ip6/{}/udp/{}/quic-v1/webtransport/certhash/uEiAb-_/p2p/{}".format, st.ip_addresses(v=6), ports, st.just(PEER_ID)),
    st.builds(f"/dns4/relay.example.org/tcp/{{}}/p2p/{RELAY}/p2p-circuit/p2p/{{}}".format, ports, st.just(PEER_ID)),
)


def addresses(node: str) -> st.SearchStrategy[Address]:
    def some(of: st.SearchStrategy[str]) -> st.SearchStrategy[tuple[str, ...]]:
        return st.lists(of, max_size=3, unique=True).map(tuple)

    return st.builds(Address, st.just(node), ipfs=some(multiaddrs), bittorrent=some(host_ports), http=some(base_urls))


def offers(node: st.SearchStrategy[str] | str) -> st.SearchStrategy[Offer]:
    return st.builds(
        Offer,
        node=st.just(node) if isinstance(node, str) else node,
        cid=cids,
        infohash=st.none() | hexes(40),
        infohash_v2=st.none() | hexes(64),
        manifest=st.none() | cids,
        name=names,
        size=sizes,
        serving=st.booleans(),
        free_slots=st.integers(0, 64),
        context_length=st.integers(0, 1 << 20),
        seeders=st.integers(0, 1000),
        peers=st.integers(0, 1000),
        tokens_per_second=st.floats(0, 1000).map(lambda value: round(value, 1)),
    )


seal_keys = st.builds(SealKey, st.integers(0, 255), hexes(64), st.integers(1, 1 << 33))

# --- what is asked, and what is answered ---

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
tokens = st.integers(0, 1 << 20)
samplings = st.builds(
    Sampling,
    max_tokens=st.none() | st.integers(1, 1 << 20),
    temperature=st.floats(0, 2),
    top_k=st.integers(0, 100),
    repeat_penalty=st.floats(0.5, 2),
    seed=st.none() | st.integers(0, 1 << 32),
    stop=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9), max_size=4).map(tuple),
    logit_bias=st.dictionaries(tokens, st.floats(-100, 100), max_size=3),
    logprobs=st.none() | st.integers(0, 20),
)
calls = st.fixed_dictionaries({"name": st.just("f"), "arguments": texts}).map(
    lambda function: {"id": "call_1", "type": "function", "function": function}
)
chat_messages = (
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": texts})
    | st.fixed_dictionaries({"role": st.just("assistant"), "content": texts, "tool_calls": st.lists(calls, min_size=1, max_size=2)})
    | st.fixed_dictionaries({"role": st.just("tool"), "content": texts, "tool_call_id": texts})
)
schemas = st.dictionaries(texts, texts | st.integers() | st.dictionaries(texts, texts, max_size=2), max_size=3)
REQUESTS = (
    st.builds(ChatRequest, st.lists(chat_messages, min_size=1, max_size=4).map(tuple), samplings, schema=st.none() | schemas)
    | st.builds(
        ChatRequest,
        st.lists(chat_messages, min_size=1, max_size=4).map(tuple),
        tools=st.builds(Tool, st.just("f"), texts, schemas).map(lambda tool: (tool,)),
        tool_choice=st.just("required"),
        forced_tool=st.sampled_from([None, "f"]),
        parallel_tool_calls=st.booleans(),
    )
    | st.builds(CompletionRequest, texts | st.lists(tokens, min_size=1, max_size=5).map(tuple), samplings)
    | st.builds(EmbeddingRequest, st.lists(texts | st.lists(tokens, min_size=1, max_size=5).map(tuple), min_size=1).map(tuple))
)
candidates = st.builds(Candidate, st.binary(max_size=8), st.floats(-1e6, 0))
call_pieces = st.builds(ToolCallDelta, st.integers(0, 3), st.none() | st.just("call_1"), st.none() | st.just("f"), texts)
deltas = st.builds(
    Delta,
    texts,
    st.lists(st.builds(ToolCallDelta, st.integers(0, 3), st.none() | st.just("call_1"), st.none() | st.just("f"), texts), max_size=2).map(
        tuple
    ),
    st.lists(st.builds(TokenLogprob, candidates, st.lists(candidates, max_size=3).map(tuple)), max_size=2).map(tuple),
)
finished = st.builds(Delta, texts, finish=st.sampled_from(["stop", "length", "tool_calls"]), usage=st.builds(Usage, tokens, tokens, tokens))
DELTAS = deltas | finished
