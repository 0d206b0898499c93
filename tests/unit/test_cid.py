from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.cid import LEAF_SIZE, Cid, Leaf, UnixfsHasher, leaf_cid, parse_cid, tree
from registry.errors import Malformed

MIB = LEAF_SIZE

# Made by Kubo 0.43.0: `ipfs add --only-hash -Q --cid-version=1 --raw-leaves --chunker=size-1048576 --max-file-links=1024`
# over a stream whose i-th MiB consists of the byte i % 251.
KUBO = {
    0: "bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku",
    1: "bafkreidogqfzz75tpkmjzjke425xqcrmpcib2p5tg44hnbirumdbpl5adu",
    1000: "bafkreicudm7j3kqjwif7qx5cops4xu7iagc2utwctdtwlw4hoqvxae4kkm",
    MIB: "bafkreibq4fevl27rgurgnxbp7adh42aqiyd6ouflxhj3gzmcxcxzbh6lla",
    MIB + 1: "bafybeiaomlonartwxzal4y3jecn5axopw3ip6ie37q33qlyuccqpfok7p4",
    5 * MIB - 3: "bafybeieukuif3bfqepk6imlqljz44txmutctwgaickput54iimrt7iy3da",
    1024 * MIB: "bafybeigjbtha3dlwwfm54l2zggdcemqsbzlvjknwyzza42x6tydo5tg2su",
    1024 * MIB + 1: "bafybeigsy2e3ztp2xhiljvwj4274aqczzzudlrr6lm6j7uk3pfdjnjti7e",
    1100 * MIB + 5: "bafybeifbeyh7sgjjuwixwzzwpbk2r2eyzvjfialmfjweptl4urqtj32qzu",
    2049 * MIB: "bafybeigvhlmovwq54niwtur3vqd3bjz5junwyunysvg77al62ljyi7dfea",
}


def stream(size: int) -> Iterator[bytes]:
    for i in range(0, size, MIB):
        yield bytes((i // MIB % 251,)) * min(MIB, size - i)


def cid_of(*pieces: bytes) -> str:
    hasher = UnixfsHasher()
    for piece in pieces:
        hasher.update(piece)
    return hasher.finish()


@pytest.mark.parametrize("size", [size for size in KUBO if size < 10 * MIB])
def test_the_hasher_agrees_with_kubo(size: int) -> None:
    assert cid_of(*stream(size)) == KUBO[size]


@pytest.mark.parametrize("size", [size for size in KUBO if size > MIB])
def test_the_tree_agrees_with_kubo_beyond_one_level(size: int) -> None:
    full = [Leaf(hashlib.sha256(bytes((i,)) * MIB).digest(), MIB) for i in range(min(251, size // MIB))]
    leaves = [full[i % 251] for i in range(size // MIB)]
    if rest := size % MIB:
        leaves.append(Leaf(hashlib.sha256(bytes((size // MIB % 251,)) * rest).digest(), rest))
    root, nodes = tree(leaves)
    assert root == KUBO[size]
    levels = 1 if len(leaves) <= 1024 else 1 + -(-len(leaves) // 1024)
    assert len(nodes) == levels and nodes[-1] == root


@given(cuts=st.lists(st.integers(0, 3 * MIB), max_size=8))
def test_how_the_bytes_are_cut_does_not_matter(cuts: list[int]) -> None:
    data = memoryview(b"".join(stream(3 * MIB - 7)))
    hasher = UnixfsHasher()
    edges = [0, *sorted(cuts), len(data)]
    for start, end in pairwise(edges):
        hasher.update(data[start:end])
    assert hasher.finish() == WHOLE
    assert hasher.leaves == [leaf_cid(piece) for piece in stream(3 * MIB - 7)]


WHOLE = cid_of(*stream(3 * MIB - 7))


def test_leaves_and_nodes_cover_every_block() -> None:
    hasher = UnixfsHasher()
    for piece in stream(2 * MIB):
        hasher.update(piece)
    assert hasher.finish() == hasher.finish()
    assert len(hasher.leaves) == 2 and hasher.nodes == [hasher.finish()]
    small = UnixfsHasher()
    assert small.leaves == []
    assert [small.finish()] == small.leaves and small.nodes == []
    with pytest.raises(RuntimeError):
        small.update(b"x")


def test_items_wider_than_a_byte_are_hashed_as_bytes() -> None:
    hasher = UnixfsHasher()
    hasher.update(memoryview(bytes(8)).cast("Q"))
    assert hasher.finish() == leaf_cid(bytes(8))


# `ipfs cid format -b <base>` and `-v 0` of Kubo 0.43.0.
SPELT = "bafybeihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku"
SPELLINGS = [
    SPELT,
    SPELT.upper(),
    "QmdfTbBqBPQ7VNxZEYEj14VmRuZBkqFbiwReogJgS1zR1n",
    "k2jmtxx1epa2wl096hsbpuhrz9xhppklonehzwkmskc9rmeb51kwn4ut",
    "zdj7Wkkhxcu2rsiN6GUyHCLsSLL47kdUNfjbFqBUUhMFTZKBi",
    "f01701220e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
]


@pytest.mark.parametrize("text", SPELLINGS)
def test_every_spelling_is_one_cid(text: str) -> None:
    assert parse_cid(text).canonical == SPELT
    assert parse_cid(text).codec == "dag-pb"


@given(codec=st.sampled_from(["raw", "dag-pb"]), digest=st.binary(min_size=32, max_size=32))
def test_cids_round_trip(codec: str, digest: bytes) -> None:
    cid = Cid(codec, digest)  # type: ignore[arg-type]
    assert parse_cid(cid.canonical) == cid
    assert str(cid) == cid.canonical == cid.canonical.lower()


def in_base32(binary: bytes) -> str:
    return "b" + base64.b32encode(binary).decode().rstrip("=").lower()


DIGEST = bytes(range(32))
BAD = {
    "empty": "",
    "a path": "../etc/passwd",
    "a path behind a CID": KUBO[0] + "/../x",
    "a path inside": KUBO[0][:20] + "../" + KUBO[0][23:],
    "cut off": KUBO[0][:-1],
    "one more": KUBO[0] + "a",
    "wrong letter": KUBO[0][:-1] + "1",
    "mixed case": KUBO[0][:-1] + KUBO[0][-1].upper(),
    "leftover bits": in_base32(b"\x01\x55\x12\x20" + DIGEST)[:-1] + "b",
    "unknown multibase": "m" + KUBO[0][1:],
    "no multibase": KUBO[0][1:],
    "sha1": in_base32(b"\x01\x55\x11\x14" + DIGEST[:20]),
    "blake3": in_base32(b"\x01\x55\x1e\x20" + DIGEST),
    "identity": in_base32(b"\x01\x55\x00\x04abcd"),
    "short digest": in_base32(b"\x01\x55\x12\x1f" + DIGEST[:31]),
    "length lies": in_base32(b"\x01\x55\x12\x20" + DIGEST[:31]),
    "dag-cbor": in_base32(b"\x01\x71\x12\x20" + DIGEST),
    "libp2p key": in_base32(b"\x01\x72\x12\x20" + DIGEST),
    "version 2": in_base32(b"\x02\x55\x12\x20" + DIGEST),
    "long varint": in_base32(b"\x81\x00\x55\x12\x20" + DIGEST),
    "endless varint": in_base32(b"\xff" * 36),
    "v0 of the wrong hash": "Qm" + "1" * 44,
    "v0 with a wrong letter": "Qm" + "0" * 44,
    "huge": "b" + "a" * 10_000,
    "not ascii": "b\u0130" + KUBO[0][2:],
    "base16 with odd length": "f015",
    "base16 in mixed case": "f0155122" + "aA" * 33,
    "newline": KUBO[0] + "\n",
    "padding": KUBO[0] + "======",
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD.keys())
def test_what_is_no_cid_is_malformed(text: str) -> None:
    with pytest.raises(Malformed):
        parse_cid(text)


@given(st.text(max_size=200))
def test_any_text_parses_or_is_malformed(text: str) -> None:
    try:
        parse_cid(text)
    except Malformed:
        pass
