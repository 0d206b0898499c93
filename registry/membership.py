"""The keys of a swarm: how members are found, how they prove that they belong, and how their words are sealed. Pure.

The open swarm has constants that everybody knows. A closed one derives all of it from a name and a secret:

    root       scrypt(secret, salt = "swarmctl/1/closed/" + name), so that each guess at a weak secret costs a tenth of a second
    the rest   HKDF-Expand (RFC 5869) of the root, one label each: what one of them shows tells nothing about another

Name and secret are normalised (NFC), so that the same words typed on two systems give the same keys.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import unicodedata
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from registry.errors import Malformed, NotVerified, Stale

OPEN_TOPIC = "/swarmctl/1/announce"
OPEN_PROTOCOL = "/x/swarmctl/1"
MAX_NAME = 64  # characters
MIN_SECRET, MAX_SECRET = 16, 1024  # characters
DHT_KEY = 20  # bytes of a key of the BitTorrent DHT (BEP 5)
SEAL_NONCE = 12  # bytes (RFC 8439)
SEAL_OVERHEAD = SEAL_NONCE + 16  # bytes that sealing adds: the nonce and the tag
PROOF_NONCE = 16  # bytes
MAX_SKEW_MS = 120_000  # that the clocks of two members may differ

_TIME = 8  # bytes of a proof's time
_PROOF = re.compile(r"[A-Za-z0-9_-]{75}")  # base64url of time, nonce and MAC: 56 bytes
_WHAT = re.compile(r"swarm|code:[a-z2-7]{7}")
_LABEL = b"swarmctl/1/closed/"
_SCRYPT = {"n": 1 << 15, "r": 8, "p": 1}  # 32 MiB and about 0.1 s


@dataclass(frozen=True, slots=True)
class SwarmKeys:
    """What a closed swarm derives. The first three may be seen by anybody, and lead back to neither name nor secret."""

    topic: str  # of pubsub
    protocol: str  # of libp2p streams
    fingerprint: str  # tells two swarms apart, for members
    rendezvous: bytes = field(repr=False)
    sealing: bytes = field(repr=False)
    proving: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Proof:
    """A proof that was checked: unix milliseconds at the asker, and the nonce that must not come again."""

    time_ms: int
    nonce: bytes


def derive(name: str, secret: str) -> SwarmKeys:
    """The keys of the closed swarm `name`. Takes 0.1 s and 32 MiB. Raises `Malformed` when one of them cannot be used."""
    salt = _LABEL + check_name(name).encode()
    root = Scrypt(salt=salt, length=32, **_SCRYPT).derive(check_secret(secret).encode())
    return SwarmKeys(
        topic=_expand(root, b"topic", 20).hex(),
        protocol=f"/x/{_expand(root, b'protocol', 20).hex()}",
        fingerprint=_expand(root, b"fingerprint", 16).hex(),
        rendezvous=_expand(root, b"rendezvous", 32),
        sealing=_expand(root, b"sealing", 32),
        proving=_expand(root, b"proving", 32),
    )


def check_name(name: str) -> str:
    """The normalised name: 1 to 64 printable characters. Raises `Malformed`."""
    normal = unicodedata.normalize("NFC", name)
    if not 1 <= len(normal) <= MAX_NAME or not normal.isprintable() or normal != normal.strip():
        raise Malformed(f"it must have 1 to {MAX_NAME} printable characters, no spaces around them")
    return normal


def check_secret(secret: str) -> str:
    """The normalised secret: 16 to 1024 printable characters. Raises `Malformed`, which does not repeat it."""
    normal = unicodedata.normalize("NFC", secret)
    if not MIN_SECRET <= len(normal) <= MAX_SECRET:
        raise Malformed(f"it must have {MIN_SECRET} to {MAX_SECRET} characters")
    if not normal.isprintable() or normal != normal.strip():
        raise Malformed("it must have printable characters only, and no spaces around them")
    return normal


# -- rendezvous ---------------------------------------------------------------------------------------------------------


def open_key(what: str) -> bytes:
    """The DHT key of the open swarm for `what`: SHA-1 of `swarmctl/1/swarm` or `swarmctl/1/code/CODE`. 20 bytes."""
    return hashlib.sha1(open_block(what), usedforsecurity=False).digest()


def open_block(what: str) -> bytes:
    """The block whose provider records lead to the open swarm: that same text."""
    return f"swarmctl/1/{_checked(what).replace(':', '/')}".encode()


def closed_key(keys: SwarmKeys, what: str) -> bytes:
    """The DHT key for `what`, which only members can compute. 20 bytes."""
    return _mac(keys.rendezvous, b"dht", _checked(what).encode())[:DHT_KEY]


def closed_block(keys: SwarmKeys, what: str) -> bytes:
    """The block for `what`, of 32 bytes. It cannot be told from random bytes."""
    return _mac(keys.rendezvous, b"block", _checked(what).encode())


def _checked(what: str) -> str:
    if not _WHAT.fullmatch(what):
        raise Malformed("a rendezvous is for the swarm or for a code of 7 characters")
    return what


# -- sealing ------------------------------------------------------------------------------------------------------------


def seal(keys: SwarmKeys, nonce: bytes, data: bytes, what: str) -> bytes:
    """`nonce` (12 random bytes), then `data` under ChaCha20-Poly1305 (RFC 8439). `what` says what it is, and is bound to it."""
    return nonce + ChaCha20Poly1305(keys.sealing).encrypt(nonce, data, what.encode())


def open_sealed(keys: SwarmKeys, sealed: bytes, what: str, *, limit: int) -> bytes:
    """The data of at most `limit` bytes. Raises `Malformed` beyond that, `NotVerified` when no member sealed it as `what`."""
    if len(sealed) > limit + SEAL_OVERHEAD:
        raise Malformed(f"it has more than {limit} bytes")
    nonce, rest = sealed[:SEAL_NONCE], sealed[SEAL_NONCE:]
    if len(sealed) < SEAL_OVERHEAD:
        raise NotVerified("no member of this swarm sealed it")
    try:
        return ChaCha20Poly1305(keys.sealing).decrypt(nonce, rest, what.encode())
    except InvalidTag as error:
        raise NotVerified("no member of this swarm sealed it") from error


# -- proofs -------------------------------------------------------------------------------------------------------------


def prove(keys: SwarmKeys, *, time_ms: int, nonce: bytes, node: str, method: str, target: str) -> str:
    """A text that only a member can make: this request, now, to this node (its key; empty when it is not known)."""
    head = time_ms.to_bytes(_TIME, "big") + nonce
    mac = _request_mac(keys, head, node, method, target)
    return base64.urlsafe_b64encode(head + mac).decode().rstrip("=")


def check_proof(keys: SwarmKeys, proof: str, *, now_ms: int, own: str, method: str, target: str) -> Proof:
    """The proof of a request to the node `own`, or to one whose key the asker did not know yet.

    Raises `Malformed`, `NotVerified` or `Stale`. That its nonce is new is for the caller to see.
    """
    if not _PROOF.fullmatch(proof):
        raise Malformed("it is no proof")
    try:
        raw = base64.urlsafe_b64decode(proof + "=")
    except binascii.Error as error:
        raise Malformed("it is no proof") from error
    head, mac = raw[: _TIME + PROOF_NONCE], raw[_TIME + PROOF_NONCE :]
    to_us = hmac.compare_digest(mac, _request_mac(keys, head, own, method, target))
    to_anybody = hmac.compare_digest(mac, _request_mac(keys, head, "", method, target))
    if not to_us and not to_anybody:
        raise NotVerified("no member of this swarm made it for this request")
    time_ms = int.from_bytes(head[:_TIME], "big")
    if abs(time_ms - now_ms) > MAX_SKEW_MS:
        raise Stale("the clocks differ too much, or it is an old one")
    return Proof(time_ms, head[_TIME:])


def _request_mac(keys: SwarmKeys, head: bytes, node: str, method: str, target: str) -> bytes:
    return _mac(keys.proving, head, node.encode(), method.encode(), target.encode())


def _mac(key: bytes, *parts: bytes) -> bytes:
    """HMAC-SHA256 over the parts, each behind its length, so that none can be taken for a piece of another."""
    mac = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        mac.update(len(part).to_bytes(4, "big") + part)
    return mac.digest()


def _expand(root: bytes, label: bytes, length: int) -> bytes:
    return HKDFExpand(algorithm=SHA256(), length=length, info=_LABEL + label).derive(root)
