"""The HTTP form of gossip: `POST /swarm/1/announce`, answered in the same form.

    {"envelopes": [text, ...], "have": {NODE: SEQUENCE, ...}, "want": {NODE: [PAGE, ...], ...}, "codes": [CODE, ...]}

Each envelope is the signed text as its node wrote it, so it does not matter who passes it on; whoever speaks puts its own
first. `have` says whose newest word is known (a node is named by the first 16 hex digits of its key): what is newer is given,
and what `want` asks for. Without `have` only what `want` names is given. Both are about the one who sends them, so a lie
costs only the liar. `codes` are those of the models that the asker looks for: in a large swarm one answer has no room for
everybody, and who offers one of them comes first. In a closed swarm both bodies are sealed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from daemon.errors import VerificationError
from daemon.membership import Membership
from daemon.peerapi.reading import answer_to
from daemon.peerapi.ways import CONNECT_S, Way
from registry import announcement as rules
from registry import codes as short_codes
from registry import strictjson
from registry.errors import Malformed, NotVerified
from registry.records import Announcement

PATH = "/swarm/1/announce"
BODY_LIMIT = 256 << 10  # bytes, both ways
MEDIA_TYPE = "application/json"  # in the open swarm
BROUGHT, GIVEN = "exchange brought", "exchange given"  # what is sealed: the body of the request, and of its answer
MAX_HAVE = 4096  # nodes
MAX_WANT = 64  # nodes
MAX_CODES = 32
_FIELDS = {"envelopes", "have", "want", "codes"}
_EXCHANGE_S = 5.0
_ID = re.compile("[0-9a-f]{16}")
_CODE = re.compile(rf"[a-z2-7]{{{short_codes.SHORT}}}")


@dataclass(frozen=True, slots=True)
class Words:
    """One direction of an exchange. `have` is None where only what `want` names is asked for; both name nodes by `rules.node_id`."""

    envelopes: Sequence[bytes] = ()
    have: Mapping[str, int] | None = None
    want: Mapping[str, Sequence[int]] = field(default_factory=dict)
    codes: Sequence[str] = ()  # short ones


def body(words: Words, what: str, membership: Membership) -> bytes:
    """As many envelopes, in order, as `BODY_LIMIT` has room for, sealed as `what`: `BROUGHT` or `GIVEN`."""
    fields: dict[str, Any] = {}
    if words.have is not None:
        fields["have"] = dict(list(words.have.items())[:MAX_HAVE])
    if words.want:
        fields["want"] = {node: list(pages) for node, pages in list(words.want.items())[:MAX_WANT]}
    if words.codes:
        fields["codes"] = list(words.codes[:MAX_CODES])
    chosen: list[str] = []
    room = BODY_LIMIT - len(strictjson.dumps({**fields, "envelopes": []}))
    for envelope in words.envelopes:
        # An envelope is JSON within a JSON text: each quote takes one byte more.
        room -= len(envelope) + envelope.count(b'"') + envelope.count(b"\\") + 3
        if room < 0:
            break
        chosen.append(envelope.decode())
    return membership.seal(strictjson.dumps({**fields, "envelopes": chosen}), what)


def parse(sealed: bytes, what: str, membership: Membership) -> Words:
    """The words in a body, their envelopes unchecked. Raises `Malformed`, `NotVerified` when no member sealed it."""
    data = membership.open(sealed, what, limit=BODY_LIMIT)
    fields = strictjson.loads(data, limit=BODY_LIMIT, what="the exchange")
    if not isinstance(fields, dict) or not fields.keys() <= _FIELDS:
        raise Malformed("the exchange must be an object with envelopes")
    envelopes = fields.get("envelopes")
    if not isinstance(envelopes, list) or not all(isinstance(envelope, str) for envelope in envelopes):
        raise Malformed("envelopes must be a list of texts")
    have = _by_node(fields["have"], "have", MAX_HAVE) if "have" in fields else None
    if have is not None and not all(_is_whole(sequence, rules.MAX_SEQUENCE) for sequence in have.values()):
        raise Malformed("have must name a sequence number for each node")
    want = wanted(fields.get("want", {}))
    codes = _codes(fields.get("codes", []))
    return Words([envelope.encode() for envelope in envelopes], have, want, codes)


def wanted(fields: Any) -> dict[str, Sequence[int]]:
    """A `want` as it was sent. Raises `Malformed`."""
    want = _by_node(fields, "want", MAX_WANT)
    for pages in want.values():
        if not isinstance(pages, list) or len(pages) > rules.MAX_PAGES:
            raise Malformed("want must list the pages of each node")
        if not all(_is_whole(page, rules.MAX_PAGES - 1) for page in pages):
            raise Malformed("want must list the numbers of pages")
    return want


def chosen(
    own: Sequence[bytes],
    others: Mapping[str, Sequence[bytes]],
    *,
    sought: Set[bytes] = frozenset(),
    shuffle: random.Random,
) -> list[bytes]:
    """Ours first, then the `sought` pages, then the nodes in a new order each time, so that in a large swarm every one gets its turn.

    The first of the words of a node is its newest, which its pages count by: it comes before a sought page.
    """
    nodes = list(others)
    shuffle.shuffle(nodes)
    first: list[bytes] = []
    for node in nodes:
        pages = [envelope for envelope in others[node] if envelope in sought]
        first += [others[node][0], *pages] if pages else []
    rest = (envelope for node in nodes for envelope in others[node])
    return list(dict.fromkeys([*own, *first, *rest]))


def speaker(envelope: bytes) -> Announcement:
    """Who signed an announcement, whatever its age. Raises `VerificationError`."""
    try:
        return rules.read(envelope)
    except (Malformed, NotVerified) as error:
        raise VerificationError("announcement", str(error)) from error


async def post(
    http: aiohttp.ClientSession, way: Way, words: Words, membership: Membership
) -> Words:
    """Give `words` to the peer API at `way` and return what it gives. Raises `Unserved` or `VerificationError`."""
    timeout = aiohttp.ClientTimeout(total=_EXCHANGE_S, sock_connect=CONNECT_S)
    headers = {**way.headers, "Content-Type": membership.media_type(MEDIA_TYPE)}
    said = body(words, BROUGHT, membership)
    asking = http.post(
        way.url + PATH, data=said, headers=headers, timeout=timeout, allow_redirects=False
    )
    data = await answer_to(asking, BODY_LIMIT + membership.overhead, within_s=_EXCHANGE_S)
    try:
        return parse(data, GIVEN, membership)
    except (Malformed, NotVerified) as error:
        raise VerificationError("peer", str(error)) from error



def _by_node(fields: Any, what: str, most: int) -> dict[str, Any]:
    if not isinstance(fields, dict) or len(fields) > most:
        raise Malformed(f"{what} must be an object of at most {most} nodes")
    if not all(_ID.fullmatch(node) for node in fields):
        raise Malformed(f"{what} must name nodes by 16 hex digits")
    return fields


def _codes(entries: Any) -> tuple[str, ...]:
    if not isinstance(entries, list) or len(entries) > MAX_CODES:
        raise Malformed(f"codes must be a list of at most {MAX_CODES}")
    if not all(isinstance(entry, str) and _CODE.fullmatch(entry) for entry in entries):
        raise Malformed(f"a code must have {short_codes.SHORT} characters of base32")
    return tuple(entries)


def _is_whole(value: Any, most: int) -> bool:
    return type(value) is int and 0 <= value <= most
