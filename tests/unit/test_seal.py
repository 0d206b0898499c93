"""Sealed chat: what opens, and everything a relay could try."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.errors import Busy, VerificationError
from daemon.peerchat.seal import FRAME_LIMIT, REQUEST_LIMIT, ResponseOpener, ResponseSealer, SealKeys, seal_request

NODE = "ed25519:" + "ab" * 32
OTHER = "ed25519:" + "cd" * 32


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def exchange(*frames: bytes) -> tuple[ResponseOpener, bytes, list[bytes]]:
    """An opener, the nonce, and the wire form of each frame; the last frame is marked."""
    keys = SealKeys(NODE, Clock())
    sealed, opener = seal_request(b"ask", node=NODE, key=keys.public())
    _, sealer = keys.open_request(sealed)
    wire = [sealer.frame(frame, last=i == len(frames) - 1) for i, frame in enumerate(frames)]
    return opener, sealer.nonce, wire


@given(body=st.binary(max_size=2000), frames=st.lists(st.binary(max_size=300), min_size=1, max_size=6), cut=st.integers(1, 50))
def test_request_and_answer_arrive_however_the_stream_is_cut(body: bytes, frames: list[bytes], cut: int) -> None:
    keys = SealKeys(NODE, Clock())
    sealed, opener = seal_request(body, node=NODE, key=keys.public())
    opened, sealer = keys.open_request(sealed)
    assert opened == body
    wire = sealer.nonce + b"".join(sealer.frame(f, last=i == len(frames) - 1) for i, f in enumerate(frames))
    received: list[bytes] = []
    for start in range(0, len(wire), cut):
        received += opener.feed(wire[start : start + cut])
    opener.end()
    assert received == frames


@given(data=st.data())
@settings(max_examples=200)
def test_a_request_with_any_byte_changed_never_opens(data: st.DataObject) -> None:
    keys = SealKeys(NODE, Clock())
    sealed, _ = seal_request(b"the prompt", node=NODE, key=keys.public())
    where = data.draw(st.integers(0, len(sealed) - 1))
    # X25519 ignores the top bit of the last byte of a public key (RFC 7748), and HPKE binds the bytes as sent.
    changed = bytearray(sealed)
    changed[where] ^= data.draw(st.integers(1, 255))
    with pytest.raises(VerificationError):
        keys.open_request(bytes(changed))


@given(data=st.data())
@settings(max_examples=200)
def test_an_answer_with_any_byte_changed_never_finishes(data: st.DataObject) -> None:
    opener, nonce, wire = exchange(b"one", b"two", b"three")
    changed = bytearray(nonce + b"".join(wire))
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
    received: list[bytes] = []
    with pytest.raises(VerificationError):
        received += opener.feed(bytes(changed))
        opener.end()
    assert not opener.finished
    assert received in ([], [b"one"], [b"one", b"two"])


def test_nothing_of_the_prompt_is_on_the_wire() -> None:
    keys = SealKeys(NODE, Clock())
    sealed, _ = seal_request(b"a very private prompt", node=NODE, key=keys.public())
    assert b"private" not in sealed


@pytest.mark.parametrize("missing", ["last frame", "all frames", "nonce", "half a frame"])
def test_a_truncated_answer_is_an_error(missing: str) -> None:
    opener, nonce, wire = exchange(b"one", b"two")
    stream = {
        "last frame": nonce + wire[0],
        "all frames": nonce,
        "nonce": b"",
        "half a frame": nonce + wire[0] + wire[1][:10],
    }[missing]
    opener.feed(stream)
    with pytest.raises(VerificationError, match="cut off"):
        opener.end()


@pytest.mark.parametrize("order", [[1, 0, 2], [0, 0, 1, 2], [0, 2], [2], [0, 1, 2, 2]])
def test_frames_moved_repeated_or_left_out_are_refused(order: list[int]) -> None:
    opener, nonce, wire = exchange(b"one", b"two", b"end")
    with pytest.raises(VerificationError):
        opener.feed(nonce + b"".join(wire[i] for i in order))
        opener.end()


def test_a_frame_cannot_be_promoted_to_the_last() -> None:
    opener, nonce, wire = exchange(b"one", b"two")
    with pytest.raises(VerificationError):
        opener.feed(nonce + b"\x01" + wire[0][1:])


def test_the_answer_to_another_request_is_refused() -> None:
    keys = SealKeys(NODE, Clock())
    _, opener = seal_request(b"a", node=NODE, key=keys.public())
    other, _ = seal_request(b"a", node=NODE, key=keys.public())
    _, sealer = keys.open_request(other)
    with pytest.raises(VerificationError):
        opener.feed(sealer.nonce + sealer.frame(b"x", last=True))


def test_an_impossible_frame_length_is_refused_before_it_is_buffered() -> None:
    opener, nonce, _ = exchange(b"one")
    with pytest.raises(VerificationError, match="impossible"):
        opener.feed(nonce + b"\x00\xff\xff\xff")


def test_a_request_opens_once() -> None:
    keys = SealKeys(NODE, Clock())
    sealed, _ = seal_request(b"x", node=NODE, key=keys.public())
    keys.open_request(sealed)
    with pytest.raises(VerificationError, match="before"):
        keys.open_request(sealed)


def test_a_request_for_another_node_does_not_open() -> None:
    keys = SealKeys(NODE, Clock())
    sealed, _ = seal_request(b"x", node=OTHER, key=keys.public())
    with pytest.raises(VerificationError):
        keys.open_request(sealed)


def test_a_swapped_key_does_not_open() -> None:
    mine, theirs = SealKeys(NODE, Clock()), SealKeys(NODE, Clock())
    sealed, _ = seal_request(b"x", node=NODE, key=theirs.public())
    with pytest.raises(VerificationError):
        mine.open_request(bytes([mine.public().key_id]) + sealed[1:])


def test_the_previous_key_opens_for_an_hour_and_replays_stay_refused() -> None:
    clock = Clock()
    keys = SealKeys(NODE, clock)
    first = keys.public()
    used, _ = seal_request(b"used", node=NODE, key=first)
    keys.open_request(used)
    late, _ = seal_request(b"late", node=NODE, key=first)
    too_late, _ = seal_request(b"too late", node=NODE, key=first)

    clock.now += 3600
    assert keys.public().key_id == (first.key_id + 1) % 256
    assert keys.open_request(late)[0] == b"late"
    with pytest.raises(VerificationError, match="before"):
        keys.open_request(used)

    clock.now += 3600
    assert clock.now >= first.expires
    with pytest.raises(VerificationError, match="not in use"):
        keys.open_request(too_late)


def test_a_full_replay_table_refuses_instead_of_forgetting() -> None:
    keys = SealKeys(NODE, Clock(), replays=2)
    sealed = [seal_request(b"x", node=NODE, key=keys.public())[0] for _ in range(3)]
    keys.open_request(sealed[0])
    keys.open_request(sealed[1])
    with pytest.raises(Busy):
        keys.open_request(sealed[2])
    with pytest.raises(VerificationError):
        keys.open_request(sealed[0])


@given(noise=st.binary(max_size=400))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(VerificationError):
        SealKeys(NODE, Clock()).open_request(noise)


def test_ceilings() -> None:
    with pytest.raises(VerificationError):
        SealKeys(NODE, Clock()).open_request(bytes(REQUEST_LIMIT + 1))
    with pytest.raises(ValueError, match="large"):
        ResponseSealer(bytes(32), bytes(32)).frame(bytes(FRAME_LIMIT + 1))


@pytest.mark.parametrize("public", ["00" * 32, "zz", "ab", "01" + "00" * 31])
def test_an_unusable_announced_key_is_a_peers_fault(public: str) -> None:
    key = SealKeys(NODE, Clock()).public()
    with pytest.raises(VerificationError, match="unusable"):
        seal_request(b"x", node=NODE, key=type(key)(key.key_id, public, key.expires))
