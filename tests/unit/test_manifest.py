from __future__ import annotations

import json
import unicodedata
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.errors import Malformed
from registry.manifest import MAX_NAME, Manifest, build, display_name, parse
from registry.records import GgufFacts, Identity
from tests.unit import strategies

CID = "bafybeihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku"
AA, BB, CC, DD, EE = "aa" * 32, "bb" * 32, "cc" * 20, "dd" * 32, "ee" * 32
IDENTITY = Identity(12345, AA, BB, CID, CC, DD)
FACTS = GgufFacts("llama", "SmolLM2", "Q4_1", 134515008, 8192, EE, "apache-2.0")
MANIFEST = Manifest(IDENTITY, "SmolLM2-135M", FACTS, CID, "https://example.org/a.gguf", "2026-11-21T12:00:00Z")


@given(strategies.manifests)
def test_manifests_round_trip(manifest: Manifest) -> None:
    payload = build(manifest)
    assert parse(payload) == manifest
    assert build(parse(payload)) == payload


def test_the_statement_is_in_totos() -> None:
    statement = json.loads(build(MANIFEST))
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "urn:swarmctl:model:1"
    assert statement["subject"] == [{"name": "aa" * 32 + ".gguf", "digest": {"sha256": "bb" * 32, "blake3": "aa" * 32}}]


# Wire version 1, never to be regenerated: old signed bytes keep their meaning.
VECTOR = (
    f'{{"_type":"https://in-toto.io/Statement/v1","predicate":{{"cid":"{CID}","created":"2026-11-21T12:00:00Z","gguf":{{'
    f'"architecture":"llama","chat_template_hash":"{EE}","context_length":8192,"license":"apache-2.0","name":"SmolLM2",'
    f'"parameters":134515008,"quantization":"Q4_1"}},"infohash":"{CC}","infohash_v2":"{DD}","name":"SmolLM2-135M",'
    f'"size":12345,"source":"https://example.org/a.gguf","torrent":"{CID}"}},"predicateType":"urn:swarmctl:model:1","subject":'
    f'[{{"digest":{{"blake3":"{AA}","sha256":"{BB}"}},"name":"{AA}.gguf"}}]}}'
).encode()


def test_old_bytes_keep_their_meaning() -> None:
    assert build(MANIFEST) == VECTOR
    assert parse(VECTOR) == MANIFEST


def changed(path: str, value: Any) -> bytes:
    """The manifest with the field at `path` (a.b.0.c) set, or removed for `...`."""
    statement = json.loads(build(MANIFEST))
    *parents, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    target = statement
    for step in parents:
        target = target[step]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return json.dumps(statement).encode()


BAD: dict[str, list[Any]] = {
    "_type": [..., None, "https://in-toto.io/Statement/v0.1", 1],
    "predicateType": [..., None, "urn:swarmctl:model:2", "https://slsa.dev/provenance/v1", ["urn:swarmctl:model:1"]],
    "subject": [..., {}, [], [{}], ["x"], [{"name": "x", "digest": {}}] * 2],
    "subject.0.name": [..., "../../evil", "aa" * 32, "bb" * 32 + ".gguf"],
    "subject.0.digest": [..., None, []],
    "subject.0.digest.sha256": [..., "", "bb" * 31, "BB" * 32, "../" + "b" * 61, 5],
    "subject.0.digest.blake3": [..., "ab" * 32, "aa" * 33],
    "predicate": [..., None, [], "x"],
    "predicate.name": [..., None, 1, "", "..", "\u200b\u202e", "/", "\x00"],
    "predicate.size": [..., 0, -1, True, 1.0, "5", 1 << 60],
    "predicate.cid": [..., None, "../x", CID.upper(), CID + "\n", "QmdfTbBqBPQ7VNxZEYEj14VmRuZBkqFbiwReogJgS1zR1n"],
    "predicate.infohash": [..., None, "cc" * 32, "CC" * 20],
    "predicate.infohash_v2": [..., None, "dd" * 20],
    "predicate.torrent": ["x", 1, CID[:-1]],
    "predicate.source": [1, "", "file:///etc/passwd", "javascript:alert(1)", "http://u:p@h/", "http://h/\x1b[2J"],
    "predicate.created": [..., None, "yesterday", "2026-11-21", "2026-11-21T12:00:00+02:00", "2026-11-21T12:00:00Z\n"],
    "predicate.gguf": [..., None, []],
    "predicate.gguf.architecture": [..., None, 1],
    "predicate.gguf.parameters": [-1, 1 << 60, 1.5, True, "1"],
    "predicate.gguf.context_length": [-1, 1 << 40],
    "predicate.gguf.chat_template_hash": ["x", "ee" * 31, 5],
    "predicate.gguf.license": [5, ["mit"]],
}


@pytest.mark.parametrize(("path", "value"), [(path, value) for path, values in BAD.items() for value in values])
def test_a_wrong_field_is_malformed(path: str, value: Any) -> None:
    with pytest.raises(Malformed):
        parse(changed(path, value))


@pytest.mark.parametrize("payload", [b"", b"[]", b"null", b'{"_type":1,"_type":2}', b"{" * 50_000, b" " * (1 << 17), b"\xff\xfe"])
def test_what_is_no_manifest_is_malformed(payload: bytes) -> None:
    with pytest.raises(Malformed):
        parse(payload)


def test_unknown_fields_are_ignored_as_in_toto_asks() -> None:
    assert parse(changed("predicate.later", {"x": 1})) == MANIFEST
    assert parse(changed("predicate.gguf.later", "x")) == MANIFEST


@pytest.mark.parametrize("path", ["torrent", "source", "gguf.name", "gguf.quantization", "gguf.parameters", "gguf.license"])
def test_what_may_be_missing_may_be_missing(path: str) -> None:
    assert parse(changed(f"predicate.{path}", ...)) == parse(changed(f"predicate.{path}", None))


def test_texts_are_cleaned_on_both_sides() -> None:
    dirty = "\x1b]52;c;x\x07\u202e"
    facts = replace(FACTS, name=dirty + "a", license="\u200b", architecture="\n")
    manifest = parse(build(replace(MANIFEST, name=dirty + "b", facts=facts)))
    assert manifest.name == "]52;c;xb"
    assert manifest.facts == replace(FACTS, name="]52;c;xa", license=None, architecture="unknown")
    assert parse(changed("predicate.gguf.name", dirty)).facts.name == "]52;c;x"


def test_what_nobody_would_accept_is_not_built() -> None:
    for wrong in ({"name": ".."}, {"source": "file:///x"}, {"identity": replace(IDENTITY, size=0)}):
        with pytest.raises(Malformed):
            build(replace(MANIFEST, **wrong))


NAMES = {
    "qwen-3b": "qwen-3b",
    "  two   words\n": "two words",
    "../../etc/passwd": "..-..-etc-passwd",
    "a\\..\\b": "a-..-b",
    "\x1b[2J\x1b]52;c;eA==\x07x": "[2J]52;c;eA==x",
    "model\u202efgug.exe": "modelfgug.exe",
    "ze\u200bro\u2060\ufeff\u3164width\ufe0f": "zerowidth",
    "nul\x00": "nul",
    "line\u2028sep": "line sep",
    "cafe\u0301": "caf\u00e9",
    "lone\ud800": "lone",
    "n" * 500: "n" * MAX_NAME,
    "\u4e2d\u6587 \U0001f600": "\u4e2d\u6587 \U0001f600",
}


@pytest.mark.parametrize(("text", "name"), NAMES.items())
def test_names_are_made_safe_to_show(text: str, name: str) -> None:
    assert display_name(text) == name


@given(st.text(max_size=300))
def test_display_names_stay_as_they_are(text: str) -> None:
    try:
        name = display_name(text)
    except Malformed:
        return
    assert display_name(name) == name
    assert 0 < len(name) <= MAX_NAME and name.strip() == name
    assert not any(unicodedata.category(c).startswith("C") or c in "/\\" or (c.isspace() and c != " ") for c in name)
    name.encode()
