"""End-to-end sealing of a chat between the node that asks and the node that serves, whatever carries the bytes.

It follows chunked Oblivious HTTP (draft-ietf-ohai-chunked-ohttp over RFC 9458): an HPKE request (RFC 9180, base mode)
and a response of AEAD frames under keys that both ends derive. docs/decisions/0003-sealed-chat.md says where and why it
differs from the draft.

    request   = key id (1) | kem (2) | kdf (2) | aead (2) | enc (32) | HPKE ciphertext of (secret (32) | body)
    info      = request media type | 0 | the seven header bytes | serving node's "ed25519:<hex>"
    response  = nonce (32) | frame ... | last frame
    frame     = last (1) | length (3) | ChaCha20-Poly1305 ciphertext, AAD "" or "final", nonce = base nonce XOR counter
    keys      = HKDF-Expand(HKDF-Extract(salt = enc | nonce, secret), response media type | 0 | "key" or "nonce")

What is rejected with `VerificationError`: a flipped bit anywhere, an unknown or expired key, a request for another node,
a replayed request, frames out of order, frames after the last one, and an answer that ends without its last frame.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from daemon.errors import Busy, VerificationError
from registry.records import SealKey

REQUEST_TYPE = "application/vnd.swarmctl.chat-request"
RESPONSE_TYPE = "application/vnd.swarmctl.chat-response"

REQUEST_LIMIT = 4 << 20  # bytes of a sealed request
FRAME_LIMIT = 64 << 10  # bytes of one frame before sealing
KEY_LIFETIME_S = 3600  # a key is announced for this long, and opens requests for twice as long
REPLAYS_REMEMBERED = 1 << 16  # requests that one key opens before it refuses more

_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)
_SUITE_IDS = bytes.fromhex("002000010003")  # RFC 9180 section 7: X25519, HKDF-SHA256, ChaCha20-Poly1305
_HEADER = 1 + len(_SUITE_IDS)
_ENC = 32
_SECRET = 32
_NONCE = 32
_FRAME_HEADER = 4
_TAG = 16


def seal_request(body: bytes, *, node: str, key: SealKey) -> tuple[bytes, ResponseOpener]:
    """Seal `body` to `node` under its announced `key`. Raises `VerificationError` when that key is no X25519 key."""
    header = bytes([key.key_id]) + _SUITE_IDS
    secret = os.urandom(_SECRET)
    try:
        public = X25519PublicKey.from_public_bytes(bytes.fromhex(key.public))
        sealed = _SUITE.encrypt(secret + body, public, info=_info(header, node))
    except ValueError as error:
        raise VerificationError("sealed chat", "the peer announced an unusable key", "ask another node") from error
    return header + sealed, ResponseOpener(secret, sealed[:_ENC])


@dataclass(slots=True)
class _KeyPair:
    key_id: int
    private: X25519PrivateKey
    created: float
    seen: set[bytes] = field(default_factory=set)


class SealKeys:
    """The serving node's key pairs: the current one is announced, the one before it still opens requests for an hour."""

    def __init__(
        self, node: str, clock: Callable[[], float], *, lifetime_s: int = KEY_LIFETIME_S, replays: int = REPLAYS_REMEMBERED
    ) -> None:
        self._node = node
        self._clock = clock
        self._lifetime_s = lifetime_s
        self._replays = replays
        self._pairs = [_KeyPair(os.urandom(1)[0], X25519PrivateKey.generate(), clock())]

    def public(self) -> SealKey:
        """The key to announce now; a new one is made when the last is older than its lifetime."""
        self._rotate()
        pair = self._pairs[0]
        return SealKey(pair.key_id, pair.private.public_key().public_bytes_raw().hex(), int(pair.created + 2 * self._lifetime_s))

    def open_request(self, data: bytes) -> tuple[bytes, ResponseSealer]:
        """The body of a sealed request, and what seals its answer. Raises `VerificationError`; `Busy` when the key is used up."""
        if not _HEADER + _ENC + _SECRET + _TAG <= len(data) <= REQUEST_LIMIT:
            raise _refused("it has no possible length")
        self._rotate()
        header, sealed = data[:_HEADER], data[_HEADER:]
        pair = next((pair for pair in self._pairs if pair.key_id == header[0]), None)
        if pair is None or header[1:] != _SUITE_IDS:
            raise _refused("it is sealed under a key or suite that is not in use")
        try:
            opened = _SUITE.decrypt(sealed, pair.private, info=_info(header, self._node))
        except (InvalidTag, ValueError) as error:
            raise _refused("it does not open") from error
        enc = sealed[:_ENC]
        # Only requests that open are remembered, so that noise cannot fill the table.
        if enc in pair.seen:
            raise _refused("it was sent before")
        if len(pair.seen) >= self._replays:
            raise Busy("sealed chat", "too many requests in this hour", "ask another node")
        pair.seen.add(enc)
        return opened[_SECRET:], ResponseSealer(opened[:_SECRET], enc)

    def _rotate(self) -> None:
        now = self._clock()
        newest = self._pairs[0]
        if now - newest.created >= self._lifetime_s:
            self._pairs.insert(0, _KeyPair((newest.key_id + 1) % 256, X25519PrivateKey.generate(), now))
        self._pairs = [self._pairs[0]] + [pair for pair in self._pairs[1:] if now - pair.created < 2 * self._lifetime_s]


class ResponseSealer:
    """Seals one answer: send `nonce` first, then the frames in order; the last one must be marked."""

    def __init__(self, secret: bytes, enc: bytes) -> None:
        self.nonce = os.urandom(_NONCE)
        self._keys = _FrameKeys(secret, enc, self.nonce)

    def frame(self, data: bytes, *, last: bool = False) -> bytes:
        """One frame of at most `FRAME_LIMIT` bytes, ready for the wire."""
        if len(data) > FRAME_LIMIT:
            raise ValueError("a frame is too large")
        sealed = self._keys.seal(data, last)
        return bytes([last]) + len(sealed).to_bytes(3, "big") + sealed


class ResponseOpener:
    """Opens one answer from a stream of bytes that may be cut anywhere."""

    def __init__(self, secret: bytes, enc: bytes) -> None:
        self._secret = secret
        self._enc = enc
        self._keys: _FrameKeys | None = None
        self._buffer = bytearray()
        self.finished = False  # the authenticated last frame was opened

    def feed(self, data: bytes) -> list[bytes]:
        """The frames that `data` completes, in order. Raises `VerificationError`."""
        self._buffer += data
        if self._keys is None:
            if len(self._buffer) < _NONCE:
                return []
            self._keys = _FrameKeys(self._secret, self._enc, bytes(self._buffer[:_NONCE]))
            del self._buffer[:_NONCE]
        opened: list[bytes] = []
        while (frame := self._next(self._keys)) is not None:
            opened.append(frame)
        return opened

    def end(self) -> None:
        """The stream is over. Raises `VerificationError` when the last frame has not come."""
        if not self.finished:
            raise _broken("it was cut off")

    def _next(self, keys: _FrameKeys) -> bytes | None:
        if self.finished:
            if self._buffer:
                raise _broken("there are bytes after its end")
            return None
        if len(self._buffer) < _FRAME_HEADER:
            return None
        last, length = self._buffer[0], int.from_bytes(self._buffer[1:_FRAME_HEADER], "big")
        if last > 1 or not _TAG <= length <= FRAME_LIMIT + _TAG:
            raise _broken("a frame has an impossible header")
        if len(self._buffer) < _FRAME_HEADER + length:
            return None
        sealed = bytes(self._buffer[_FRAME_HEADER : _FRAME_HEADER + length])
        del self._buffer[: _FRAME_HEADER + length]
        opened = keys.open(sealed, bool(last))
        self.finished = bool(last)
        return opened


class _FrameKeys:
    """The AEAD key of one answer and its counter of nonces."""

    def __init__(self, secret: bytes, enc: bytes, nonce: bytes) -> None:
        prk = hmac.digest(enc + nonce, secret, hashlib.sha256)
        self._aead = ChaCha20Poly1305(_expand(prk, b"key"))
        self._base = int.from_bytes(_expand(prk, b"nonce")[:12], "big")
        self._count = 0

    def seal(self, data: bytes, last: bool) -> bytes:
        return self._aead.encrypt(self._nonce(), data, _aad(last))

    def open(self, sealed: bytes, last: bool) -> bytes:
        try:
            return self._aead.decrypt(self._nonce(), sealed, _aad(last))
        except InvalidTag as error:
            raise _broken("a frame was changed, moved or repeated") from error

    def _nonce(self) -> bytes:
        nonce = (self._base ^ self._count).to_bytes(12, "big")
        self._count += 1
        return nonce


def _info(header: bytes, node: str) -> bytes:
    return REQUEST_TYPE.encode() + b"\0" + header + node.encode()


def _aad(last: bool) -> bytes:
    return b"final" if last else b""


def _expand(prk: bytes, label: bytes) -> bytes:
    """HKDF-Expand (RFC 5869) for one block of 32 bytes."""
    return hmac.digest(prk, RESPONSE_TYPE.encode() + b"\0" + label + b"\x01", hashlib.sha256)


def _refused(why: str) -> VerificationError:
    return VerificationError("sealed request", why, "fetch the node's newest announcement and ask again")


def _broken(why: str) -> VerificationError:
    return VerificationError("sealed answer", why, "ask again")
