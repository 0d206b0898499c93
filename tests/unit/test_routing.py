from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry import upstream
from registry.cid import Cid
from registry.codes import code_of_cid, code_of_infohash_v2
from registry.errors import AmbiguousRef, Malformed
from registry.records import Offer
from registry.routing import Choice, Stats, aggregate, candidates, resolve
from tests.unit import strategies

OWN = "ed25519:own"


def cid(model: str) -> str:
    return Cid("dag-pb", model.encode().ljust(32, b".")).canonical


def v2(model: str) -> str:
    return model.encode().hex().ljust(64, "0")


def offer(node: str, model: str, *, serving: bool = True, **more: Any) -> Offer:
    given_ = {"infohash": "ab" * 20, "infohash_v2": v2(model), "manifest": None, "name": model, "size": 100, **more}
    return Offer(node=node, cid=given_.pop("cid", cid(model)), serving=serving, **given_)


def asked(offers: list[Offer], wanted: str | None, **more: Any) -> list[str]:
    return [choice.offer.node for choice in candidates(offers, wanted=wanted, **more)]


# What is offered of the one wanted model, and in which order its nodes come.
ORDER: dict[str, tuple[list[Offer], list[str]]] = {
    "nobody": ([], []),
    "another model": ([offer("a", "other")], []),
    "one": ([offer("a", "qwen")], ["a"]),
    "serving first": ([offer("a", "qwen", serving=False, seeders=99), offer("b", "qwen", seeders=1)], ["b", "a"]),
    "then most seeders": ([offer("a", "qwen", seeders=1, free_slots=9), offer("b", "qwen", seeders=2)], ["b", "a"]),
    "then free slots": ([offer("a", "qwen", free_slots=1), offer("b", "qwen", free_slots=2)], ["b", "a"]),
    "then latency": ([offer("slow", "qwen"), offer("quick", "qwen")], ["quick", "slow"]),
    "then success": ([offer("failing", "qwen"), offer("sound", "qwen")], ["sound", "failing"]),
    "the unmeasured between": ([offer("slow", "qwen"), offer("new", "qwen"), offer("quick", "qwen")], ["quick", "new", "slow"]),
    "then the node": ([offer("b", "qwen"), offer("a", "qwen")], ["a", "b"]),
    "holders by seeders": ([offer("a", "qwen", serving=False, seeders=1), offer("b", "qwen", serving=False, seeders=2)], ["b", "a"]),
    "a node once": ([offer("a", "qwen", serving=False), offer("a", "qwen")], ["a"]),
}
STATS = {
    "quick": Stats(0.1, 5, 0), "slow": Stats(4.0, 5, 0), "failing": Stats(0.3, 1, 9), "sound": Stats(0.3, 9, 1),
}  # fmt: skip


@pytest.mark.parametrize(("offers", "nodes"), ORDER.values(), ids=ORDER.keys())
def test_the_order_for_a_wanted_model(offers: list[Offer], nodes: list[str]) -> None:
    for wanted in (cid("qwen"), "#" + code_of_infohash_v2(v2("qwen")), code_of_cid(cid("qwen"))[:9].upper(), "qwen"):
        assert asked(offers, wanted, stats=STATS) == nodes
        assert asked(offers[::-1], wanted, stats=STATS) == nodes


def test_only_serving_nodes_can_answer_and_holders_come_after() -> None:
    chosen = candidates([offer("a", "qwen", serving=False), offer("b", "qwen")], wanted="qwen")
    assert [choice.offer.serving for choice in chosen] == [True, False]


MINE = [offer(OWN, "mine", seeders=2), offer(OWN, "also", seeders=5), offer(OWN, "idle", serving=False, seeders=50)]
NO_CODE: dict[str, tuple[list[Offer], list[Offer], list[str]]] = {
    "nobody": ([], [], []),
    "nobody serves": ([offer("a", "qwen", serving=False)], [], []),
    "the model with the most nodes": (
        [offer("a", "qwen", seeders=99), offer("b", "llama"), offer("c", "llama", serving=False)], [], ["b"],
    ),
    "then the most seeders": ([offer("a", "qwen", seeders=1), offer("b", "llama", seeders=7)], [], ["b"]),
    "only models that somebody serves": (
        [offer("a", "qwen"), offer("b", "llama", serving=False), offer("c", "llama", serving=False)], [], ["a"],
    ),
    "its nodes in the order of the rule": ([offer("a", "qwen", seeders=1), offer("b", "qwen", seeders=3)], [], ["b", "a"]),
    "fallback: the local serving model with the most seeders": ([offer("a", "qwen", seeders=9)], MINE, ["a", OWN]),
    "nobody else serves": ([offer("a", "qwen", serving=False)], MINE, [OWN]),
    "this node serves it too": ([offer("a", "mine", seeders=5)], [MINE[0]], ["a", OWN]),
}  # fmt: skip


@pytest.mark.parametrize(("offers", "local", "nodes"), NO_CODE.values(), ids=NO_CODE.keys())
def test_the_choice_without_a_code(offers: list[Offer], local: list[Offer], nodes: list[str]) -> None:
    assert asked(offers, None, local=local) == nodes
    assert asked(offers[::-1], None, local=local[::-1]) == nodes


def test_the_fallback_is_the_most_seeded_of_the_local_ones() -> None:
    chosen = candidates([offer("a", "qwen", seeders=9)], wanted=None, local=MINE)
    assert chosen[1] == Choice(MINE[1], True) and not chosen[0].local


def test_a_local_answer_costs_no_way() -> None:
    offers, mine = [offer("a", "qwen")], [offer(OWN, "qwen")]
    assert asked(offers, "qwen", local=mine, stats={"a": Stats(0.001, 100, 0)}) == [OWN, "a"]
    assert asked([offer("a", "qwen", free_slots=1)], "qwen", local=mine) == ["a", OWN]


def test_what_is_said_about_a_model_is_put_together() -> None:
    (model,) = aggregate(
        [
            offer("a", "qwen", name="Qwen", seeders=3, peers=1, manifest=cid("m")),
            offer("b", "qwen", name="Qwen", serving=False, peers=7),
            offer("c", "qwen", name="Awen", infohash_v2=None, infohash=None),
        ]
    )
    assert (model.name, model.size, model.cid, model.infohash, model.infohash_v2) == ("Qwen", 100, cid("qwen"), "ab" * 20, v2("qwen"))
    assert (model.serving, model.nodes, model.seeders, model.peers, model.local) == (True, 3, 3, 7, False)
    assert model.manifest == cid("m")
    assert model.codes == (code_of_infohash_v2(v2("qwen")), code_of_cid(cid("qwen"))) and model.code == model.codes[0][:7]


def test_holders_count_as_seeders() -> None:
    (model,) = aggregate([offer(str(i), "qwen", seeders=1) for i in range(5)], [offer(OWN, "qwen")])
    assert (model.nodes, model.seeders, model.local) == (6, 6, True)


def test_name_conflicts_go_to_the_most_common_then_the_smallest_name() -> None:
    def name(*names: str) -> str:
        return aggregate([offer(str(i), "qwen", name=name) for i, name in enumerate(names)])[0].name

    assert name("b", "a", "b") == "b"
    assert name("b", "a") == "a"
    assert aggregate([offer("a", "qwen", name="x"), offer("b", "qwen", name="x")], [offer(OWN, "qwen", name="y")])[0].name == "y"


def test_offers_that_share_an_infohash_are_one_model() -> None:
    (model,) = aggregate([offer("a", "qwen"), offer("b", "qwen"), offer("c", "qwen", cid=cid("other chunking"))])
    assert model.nodes == 3 and model.cid == cid("qwen")


def test_a_liar_cannot_tie_two_models_together() -> None:
    honest = [offer(n, m) for m in ("qwen", "llama") for n in ("a", "b")]
    liar = offer("liar", "qwen", infohash_v2=v2("llama"))
    models = aggregate([*honest, liar])
    assert sorted((m.name, m.nodes) for m in models) == [("llama", 2), ("qwen", 3)]
    assert asked([*honest, liar], code_of_infohash_v2(v2("llama"))) == ["a", "b"]
    # One against one nobody is believed, and what this node holds is known.
    assert len(aggregate([offer("a", "qwen"), offer("a", "llama"), liar])) == 2
    assert len(aggregate([liar, replace(liar, node="liar2"), offer("a", "llama")], [offer(OWN, "qwen")])) == 2


def test_an_ambiguous_code_lists_its_candidates() -> None:
    models = aggregate([offer("a", "same-one"), offer("a", "same-two")])
    with pytest.raises(AmbiguousRef, match="2 models") as caught:
        resolve(code_of_infohash_v2(v2("same-one"))[:7], models)
    assert caught.value.candidates == tuple(sorted(code_of_infohash_v2(v2(m)) for m in ("same-one", "same-two")))
    longer = resolve("#" + code_of_infohash_v2(v2("same-one"))[:14], models)
    assert longer is not None and longer.name == "same-one"
    with pytest.raises(AmbiguousRef):
        resolve("x", aggregate([offer("a", "one", name="x"), offer("a", "two", name="x")]))


def test_everything_a_model_is_called_resolves() -> None:
    models = aggregate([offer("a", "SmolLM2", manifest=cid("m")), offer("a", "llama", infohash="cd" * 20)])
    smol = next(m for m in models if m.name == "SmolLM2")
    magnet = f"magnet:?xt=urn:btmh:1220{v2('SmolLM2')}"
    for wanted in (*smol.codes, smol.code, "SmolLM2", smol.cid, f"ipfs://{cid('m')}", "ab" * 20, magnet):
        assert resolve(wanted, models) is smol
    for unknown in ("smollm2", "SmolLM3", "#2222222", cid("x"), "00" * 20):
        assert resolve(unknown, models) is None
    for wrong in ("", "./x", "https://example.org/x", "hf:a/b", "#1", "../x"):
        with pytest.raises(Malformed):
            resolve(wrong, models)


@given(st.lists(strategies.offers(st.sampled_from(["a", "b", "c"])), max_size=8), st.randoms())
def test_the_order_in_which_offers_came_does_not_matter(offers: list[Offer], random: Any) -> None:
    unique = list({(offer.node, offer.cid): offer for offer in offers}.values())
    shuffled = random.sample(unique, len(unique))
    facts = [[(m.cid, m.nodes, m.seeders, m.code, m.name) for m in aggregate(many)] for many in (unique, shuffled)]
    assert facts[0] == facts[1]
    assert candidates(unique, wanted=None) == candidates(shuffled, wanted=None)
    for choice in candidates(unique, wanted=None):
        assert choice.offer.serving


# -- what is only held here ---------------------------------------------------------------------------------------------


def test_what_this_node_only_holds_comes_after_everybody_who_serves() -> None:
    here = offer("me", "great", seeders=9, serving=False)
    others = [offer("a", "great", serving=True), offer("b", "great", seeders=20, serving=False)]
    found = candidates(others, wanted="great", local=[here])
    assert [(choice.offer.node, choice.local) for choice in found if choice.offer.serving or choice.local] == [("a", False), ("me", True)]
    assert [choice.offer.node for choice in candidates(others, wanted=None, local=[here])] == ["a"]


def test_where_nobody_serves_any_the_model_here_with_the_most_seeders_is_asked() -> None:
    mine = [offer("me", name, seeders=seeders, serving=False) for name, seeders in (("few", 2), ("many", 5))]
    others = [offer("a", "elsewhere", seeders=50, serving=False), offer("b", "few", seeders=3, serving=False)]
    found = candidates(others, wanted=None, local=mine)
    assert [(choice.offer.name, choice.offer.node, choice.local) for choice in found] == [("many", "me", True)]
    assert candidates(others, wanted=None) == []


# -- models behind an upstream ------------------------------------------------------------------------------------------


def test_the_same_upstream_model_of_two_nodes_is_one() -> None:
    offers = [upstream.offer("a", "vendor/great-1:latest", 3), upstream.offer("b", "vendor/great-1:latest", 4)]
    [model] = aggregate(offers)
    assert (model.name, model.upstream, model.serving, model.nodes, model.seeders) == ("vendor-great-1:latest", True, True, 2, 0)
    assert asked(offers, "#" + model.code) == ["b", "a"]
    assert not aggregate([offer("a", "great-1")])[0].upstream


@pytest.mark.parametrize(
    "lie", [{"name": "another"}, {"infohash_v2": v2("file")}, {"manifest": cid("file")}, {"size": 100}, {"infohash": "ab" * 20}]
)
def test_a_liar_cannot_tie_an_upstream_to_a_file(lie: dict[str, Any]) -> None:
    honest = upstream.offer("a", "great-1", 3)
    file = offer("holder", "file", cid=cid("file"))
    liars = [replace(honest, node=f"liar {number}", **lie) for number in range(3)]
    assert not any(upstream.proven(liar) for liar in liars)
    by_cid = {model.cid: model for model in aggregate([honest, file, *liars])}
    found = by_cid[honest.cid]
    assert (found.name, found.upstream, found.nodes, found.infohash_v2, found.manifest) == ("great-1", True, 1, None, None)
    assert by_cid[file.cid].nodes == 1


@given(made=strategies.offers(OWN))
def test_no_file_is_taken_for_an_upstream(made: Offer) -> None:
    assert not upstream.proven(made)
