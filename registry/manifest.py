"""What a publisher signs about a model: an in-toto Statement v1 (in-toto/attestation, spec/v1/statement.md) with our predicate.

What is accepted:
- strict JSON of at most 64 KiB, `_type` and `predicateType` exactly ours: an unknown predicate is refused, never guessed at;
- one subject, named by its blake3, with sha256 and blake3 digests;
- every digest, CID and size in its pattern; unknown further fields are ignored, as in-toto asks;
- texts are cleaned for showing: what a signer writes may still hold escape sequences or direction marks.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from registry import endpoints, strictjson
from registry.cid import parse_cid
from registry.errors import Malformed, shown
from registry.records import GgufFacts, Identity

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:swarmctl:model:1"
MAX_MANIFEST = 64 << 10  # bytes, the envelope around it included
MAX_NAME = 120  # characters
MAX_SIZE = 1 << 45  # bytes of one model
MAX_PARAMETERS = 1 << 50
MAX_CONTEXT = 1 << 30

_CHECKED = 8192  # names and CIDs that are remembered as right: many nodes say the same ones
_HEX40 = re.compile(r"[0-9a-f]{40}")
_HEX64 = re.compile(r"[0-9a-f]{64}")
_TIME = re.compile(r"[0-9]{4}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-6][0-9](\.[0-9]{1,6})?(Z|\+00:00)")

# Letters and marks that take no ink: Unicode's Default_Ignorable beyond category Cf, and the blank Braille pattern.
_INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0") | {chr(c) for c in range(0xFE00, 0xFE10)}
_UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What the signer promises about `identity`."""

    identity: Identity
    name: str
    facts: GgufFacts
    torrent: str | None  # CID of the .torrent
    source: str | None  # URL the publisher took it from
    created: str  # ISO 8601, UTC


@lru_cache(_CHECKED)
def display_name(text: str) -> str:
    """`text` as a name that is safe to show and to type: one line, no control, bidi or zero-width characters, no path separators.

    Raises `Malformed` when nothing is left.
    """
    name = _clean(re.sub(r"[/\\]+", "-", text), MAX_NAME)
    if not name.strip(". -"):
        raise Malformed(f"not a name: {shown(text)}")
    return name


def build(manifest: Manifest) -> bytes:
    """The payload to sign, its texts cleaned. Raises `Malformed` for a manifest that nobody would accept."""
    identity, facts = manifest.identity, _clean_facts(manifest.facts)
    predicate = {
        "name": display_name(manifest.name),
        "size": identity.size,
        "cid": identity.cid,
        "infohash": identity.infohash,
        "infohash_v2": identity.infohash_v2,
        "gguf": _without_none({field: getattr(facts, field) for field in GgufFacts.__dataclass_fields__}),
        "torrent": manifest.torrent,
        "source": manifest.source,
        "created": manifest.created,
    }
    payload = strictjson.dumps(
        {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": identity.filename, "digest": {"sha256": identity.sha256, "blake3": identity.blake3}}],
            "predicateType": PREDICATE_TYPE,
            "predicate": _without_none(predicate),
        }
    )
    parse(payload)
    return payload


def parse(payload: bytes) -> Manifest:
    """The manifest in a payload whose signature has been checked. Raises `Malformed`."""
    statement = _object(strictjson.loads(payload, limit=MAX_MANIFEST, what="the manifest"), "the manifest")
    if statement.get("_type") != STATEMENT_TYPE:
        raise Malformed("the manifest is no in-toto statement v1")
    if statement.get("predicateType") != PREDICATE_TYPE:
        raise Malformed(f"the manifest has another predicate than {PREDICATE_TYPE}")
    predicate = _object(statement.get("predicate"), "predicate")
    identity = _identity(statement.get("subject"), predicate)
    source = predicate.get("source")
    return Manifest(
        identity=identity,
        name=display_name(text(predicate, "name")),
        facts=_facts(_object(predicate.get("gguf"), "gguf")),
        torrent=None if predicate.get("torrent") is None else canonical_cid(predicate, "torrent"),
        source=None if source is None else endpoints.http_url(text(predicate, "source")),
        created=pattern(predicate, "created", _TIME),
    )


# -- fields of peers' JSON, shared with the announcements -----------------------------------------------------------------


def text(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise Malformed(f"{name} must be text")
    return value


def pattern(fields: dict[str, Any], name: str, wanted: re.Pattern[str]) -> str:
    value = text(fields, name)
    if not wanted.fullmatch(value):
        raise Malformed(f"{name} does not have its form: {shown(value)}")
    return value


def hex40(fields: dict[str, Any], name: str) -> str:
    return pattern(fields, name, _HEX40)


def hex64(fields: dict[str, Any], name: str) -> str:
    return pattern(fields, name, _HEX64)


def canonical_cid(fields: dict[str, Any], name: str) -> str:
    value = text(fields, name)
    if not _is_canonical_cid(value):
        raise Malformed(f"{name} is not in the one spelling of CIDs")
    return value


def whole(fields: dict[str, Any], name: str, least: int, most: int) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise Malformed(f"{name} must be a whole number from {least} to {most}")
    return value


@lru_cache(_CHECKED)
def _is_canonical_cid(value: str) -> bool:
    return parse_cid(value).canonical == value


# -- parts ------------------------------------------------------------------------------------------------------------------


def _identity(subject: Any, predicate: dict[str, Any]) -> Identity:
    if not isinstance(subject, list) or len(subject) != 1:
        raise Malformed("the manifest must be about one file")
    file = _object(subject[0], "subject")
    digest = _object(file.get("digest"), "digest")
    identity = Identity(
        size=whole(predicate, "size", 1, MAX_SIZE),
        blake3=hex64(digest, "blake3"),
        sha256=hex64(digest, "sha256"),
        cid=canonical_cid(predicate, "cid"),
        infohash=hex40(predicate, "infohash"),
        infohash_v2=hex64(predicate, "infohash_v2"),
    )
    if file.get("name") != identity.filename:
        raise Malformed("the subject is not named by its blake3")
    return identity


def _facts(fields: dict[str, Any]) -> GgufFacts:
    def optional(name: str) -> str | None:
        return None if fields.get(name) is None else text(fields, name)

    def number(name: str, most: int) -> int | None:
        return None if fields.get(name) is None else whole(fields, name, 0, most)

    return _clean_facts(
        GgufFacts(
            architecture=text(fields, "architecture"),
            name=optional("name"),
            quantization=optional("quantization"),
            parameters=number("parameters", MAX_PARAMETERS),
            context_length=number("context_length", MAX_CONTEXT),
            chat_template_hash=None if fields.get("chat_template_hash") is None else hex64(fields, "chat_template_hash"),
            license=optional("license"),
        )
    )


def _clean_facts(facts: GgufFacts) -> GgufFacts:
    def cleaned(value: str | None) -> str | None:
        return None if value is None else _clean(value, MAX_NAME) or None

    return replace(
        facts,
        architecture=_clean(facts.architecture, MAX_NAME) or "unknown",
        name=cleaned(facts.name),
        quantization=cleaned(facts.quantization),
        license=cleaned(facts.license),
    )


def _clean(value: str, limit: int) -> str:
    """One line of visible text: NFC, runs of white space become one space, control, format and private characters vanish."""
    # Cutting first bounds the work; normalising may join characters, never the other way round a second time.
    spaced = re.sub(r"\s+", " ", value[: 4 * limit])
    if spaced.isascii() and spaced.isprintable():
        return spaced.strip()[:limit].strip()
    seen = (c for c in unicodedata.normalize("NFC", spaced) if unicodedata.category(c) not in _UNSEEN and c not in _INVISIBLE)
    return unicodedata.normalize("NFC", re.sub(r" +", " ", "".join(seen)).strip()[:limit]).strip()


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Malformed(f"{what} must be an object")
    return value


def _without_none(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
