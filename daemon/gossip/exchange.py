"""The HTTP form of gossip: `POST /swarm/1/announce {"envelopes": [text, ...]}`, answered in the same form.

Each envelope is the signed text as its node wrote it, so it does not matter who passes it on. In a closed swarm both bodies are
sealed. Pure but for `post`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence

import aiohttp

from daemon.errors import Unserved, VerificationError
from daemon.membership import Membership
from daemon.peerapi.ways import CONNECT_S, Way
from registry import announcement as rules
from registry import strictjson
from registry.envelope import open_envelope
from registry.errors import Malformed, NotVerified
from registry.records import Announcement

PATH = "/swarm/1/announce"
BODY_LIMIT = 256 << 10  # bytes, both ways
MEDIA_TYPE = "application/json"  # in the open swarm
BROUGHT, GIVEN = "exchange brought", "exchange given"  # what is sealed: the body of the request, and of its answer
_EXCHANGE_S = 5.0


def body(envelopes: Iterable[bytes], what: str, membership: Membership) -> bytes:
    """As many envelopes, in order, as `BODY_LIMIT` has room for, sealed as `what`: `BROUGHT` or `GIVEN`."""
    chosen: list[str] = []
    room = BODY_LIMIT - len('{"envelopes":[]}')
    for envelope in envelopes:
        # An envelope is JSON within a JSON text: each quote takes one byte more.
        room -= len(envelope) + envelope.count(b'"') + envelope.count(b"\\") + 3
        if room < 0:
            break
        chosen.append(envelope.decode())
    return membership.seal(strictjson.dumps({"envelopes": chosen}), what)


def parse(sealed: bytes, what: str, membership: Membership) -> list[bytes]:
    """The envelopes in a body, unchecked. Raises `Malformed`, `NotVerified` when no member sealed it."""
    data = membership.open(sealed, what, limit=BODY_LIMIT)
    fields = strictjson.loads(data, limit=BODY_LIMIT, what="the exchange")
    if not isinstance(fields, dict) or fields.keys() != {"envelopes"}:
        raise Malformed("the exchange must be an object with envelopes")
    envelopes = fields["envelopes"]
    if not isinstance(envelopes, list) or not all(isinstance(envelope, str) for envelope in envelopes):
        raise Malformed("envelopes must be a list of texts")
    return [envelope.encode() for envelope in envelopes]


def chosen(own: Sequence[bytes], others: Mapping[str, Sequence[bytes]], *, shuffle: random.Random) -> list[bytes]:
    """Ours first, then the nodes in a new order each time, so that in a large swarm every one gets its turn."""
    nodes = list(others)
    shuffle.shuffle(nodes)
    return [*own, *(envelope for node in nodes for envelope in others[node])]


def speaker(envelope: bytes) -> Announcement:
    """Who signed an announcement, whatever its age. Raises `VerificationError`."""
    try:
        opened = open_envelope(envelope, rules.PAYLOAD_TYPE, limit=rules.MAX_ENVELOPE)
        said = rules.parse(opened.payload)
    except (Malformed, NotVerified) as error:
        raise VerificationError("announcement", str(error)) from error
    if opened.keys != (said.node,):
        raise VerificationError("announcement", "it is not signed by the node that it speaks of")
    return said


async def post(
    http: aiohttp.ClientSession, way: Way, envelopes: Iterable[bytes], membership: Membership
) -> list[bytes]:
    """Give `envelopes` to the peer API at `way` and return what it gives. Raises `Unserved` or `VerificationError`."""
    timeout = aiohttp.ClientTimeout(total=_EXCHANGE_S, sock_connect=CONNECT_S)
    headers = {**way.headers, "Content-Type": membership.media_type(MEDIA_TYPE)}
    said = body(envelopes, BROUGHT, membership)
    try:
        async with http.post(
            way.url + PATH, data=said, headers=headers, timeout=timeout, allow_redirects=False
        ) as response:
            if response.status != 200:
                raise Unserved("peer", f"its peer API answered {response.status}")
            data = await _bounded(response, BODY_LIMIT + membership.overhead)
    except (aiohttp.ClientError, ConnectionError) as error:
        raise Unserved("peer", "nothing answers there") from error
    except TimeoutError as error:
        raise Unserved("peer", f"nothing answered within {_EXCHANGE_S:.0f} s") from error
    try:
        return parse(data, GIVEN, membership)
    except (Malformed, NotVerified) as error:
        raise VerificationError("peer", str(error)) from error


async def _bounded(response: aiohttp.ClientResponse, limit: int) -> bytes:
    data = bytearray()
    async for piece in response.content.iter_any():
        data += piece
        if len(data) > limit:
            raise VerificationError("peer", "it sent more than an exchange may have")
    return bytes(data)
