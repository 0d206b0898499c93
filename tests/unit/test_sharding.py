"""Who listens where, and who speaks, in a swarm of any size."""

from __future__ import annotations

from collections import Counter

import pytest

from registry.cid import leaf_cid
from registry.codes import code_of_cid
from registry.errors import Malformed
from registry.sharding import EPOCH_S, SHARD_AT, SHARDS, drawn, interval_s, next_share, shard, topics

CODES = [code_of_cid(leaf_cid(b"%d" % number)) for number in range(20_000)]
NODES = [f"ed25519:{number:064x}" for number in range(5000)]


def test_a_small_swarm_has_one_topic() -> None:
    assert topics("/t", CODES[:20], SHARD_AT) == {"/t"}
    assert topics("/t", [], SHARD_AT) == {"/t"}


def test_every_spelling_of_a_code_is_on_one_shard() -> None:
    for code in CODES[:50]:
        assert topics("/t", [code], SHARD_AT + 1) == topics("/t", [f"#{code[:7].upper()}"], 10**6) == {f"/t/{shard(code):03x}"}
    with pytest.raises(Malformed):
        shard("x")


def test_the_shards_are_even() -> None:
    crowd = Counter(map(shard, CODES))
    assert all(0 <= number < SHARDS for number in crowd)
    assert len(crowd) > SHARDS * 0.95 and max(crowd.values()) < 25


def test_a_share_of_the_nodes_is_drawn_and_stays_for_an_hour() -> None:
    first = [node for node in NODES if drawn(node, "/t/1", 0, 0.1)]
    assert 400 < len(first) < 600
    assert first == [node for node in NODES if drawn(node, "/t/1", EPOCH_S - 1, 0.1)]
    # Who is drawn goes on speaking when more are.
    assert set(first) < {node for node in NODES if drawn(node, "/t/1", 0, 0.2)}
    for other in ([node for node in NODES if drawn(node, "/t/1", EPOCH_S, 0.1)], [node for node in NODES if drawn(node, "/t/2", 0, 0.1)]):
        assert len(set(first) & set(other)) < 0.3 * len(first)
    assert all(drawn(node, "/t/1", 0, 1.0) for node in NODES)


@pytest.mark.parametrize("crowd", [5, 40, 5000])
def test_the_share_settles_where_the_room_is_filled(crowd: int) -> None:
    share = 1.0
    for _ in range(5):
        heard = sum(drawn(node, "/t/1", 0, share) for node in NODES[:crowd])
        share = next_share(share, heard, 40)
    spoken = sum(drawn(node, "/t/1", 0, share) for node in NODES[:crowd])
    assert spoken == crowd if crowd <= 40 else 25 < spoken < 60


def test_a_shard_has_a_bounded_number_of_beats() -> None:
    assert interval_s(12, 0) == interval_s(12, 2) == 12
    assert interval_s(12, 32) == 192 and 3 * interval_s(12, 10**6) < 900
