"""A node that exists only in what it signs: announcements, manifests and torrents that a sane node would not make."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import http.client
import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from daemon.torrent import metainfo
from daemon.torrent.bencode import encode
from daemon.transfer.identify import Identified, identify
from daemon.transfer.objects import object_cid
from registry import announcement, envelope, manifest
from registry.records import Address, Announcement, GgufFacts, Identity, Offer
from tests.functional.nodes import Node
from tests.unit.gguf_files import tiny_gguf


class Forger:
    """Signs with a key of its own. What `objects` holds its peer API gives, under whatever CID it stands there."""

    def __init__(self, url: str, objects: dict[str, bytes]) -> None:
        self.key = Ed25519PrivateKey.generate()
        self.node = envelope.key_name(self.key)
        self.objects = objects
        self._url = url
        self._sequence = time.time_ns() // 1_000_000

    def gives(self, data: bytes) -> str:
        """The CID under which the peer API has `data` from now on."""
        cid = object_cid(data)
        self.objects[cid] = data
        return cid

    def manifest(self, identity: Identity, *, name: str, torrent: bytes | None = None, key: Ed25519PrivateKey | None = None) -> bytes:
        """A manifest that is right in itself: whether its promises can be kept is another matter."""
        named = None if torrent is None else self.gives(torrent)
        claims = manifest.Manifest(identity, name, GgufFacts("llama"), named, None, "2026-01-01T00:00:00Z")
        return envelope.sign(manifest.PAYLOAD_TYPE, manifest.build(claims), key or self.key)

    def offer(self, identity: Identity, name: str, signed: bytes | None = None) -> Offer:
        named = None if signed is None else self.gives(signed)
        return Offer(self.node, identity.cid, identity.infohash, identity.infohash_v2, named, name, identity.size, False, seeders=1)

    def announces(self, to: Node, *offers: Offer, bittorrent: tuple[str, ...] = ()) -> None:
        """`POST /api/swarm/register`, in the place of whatever was announced before."""
        self._sequence += 1
        said = Announcement(
            node=self.node, peer_id=None, sequence=self._sequence, expires=int(time.time()) + 600,
            address=Address(self.node, (), bittorrent, (self._url,)), seal_keys=(), offers=offers,
            page=0, revisions=(self._sequence,),
        )  # fmt: skip
        signed = envelope.sign(announcement.PAYLOAD_TYPE, announcement.build(said), self.key)
        connection = http.client.HTTPConnection(urlsplit(to.status["api"]).netloc, timeout=20)
        token = (to.home / "token").read_text().strip()
        connection.request("POST", "/api/swarm/register", signed, {"Authorization": f"Bearer {token}", "Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        connection.close()


@contextmanager
def forger() -> Iterator[Forger]:
    objects: dict[str, bytes] = {}
    who: list[str] = []

    class PeerApi(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = objects.get(self.path.rpartition("/")[2])
            if self.path == "/swarm/1/ping":
                data = json.dumps({"node": who[0]}).encode()
            self.send_response(404 if data is None else 200)
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            self.wfile.write(data or b"")

        def do_POST(self) -> None:
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), PeerApi) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            made = Forger(f"http://127.0.0.1:{server.server_port}", objects)
            who.append(made.node)
            yield made
        finally:
            server.shutdown()
            thread.join()


def identified(path: Path) -> Identified:
    return asyncio.run(identify(path))


def unheard_of(folder: Path, seed: int) -> Identified:
    """A model that nobody has."""
    return identified(tiny_gguf(folder / f"unheard-of-{seed}.gguf", 1 << 20, seed=seed))


def alike(identity: Identity, prefix: str) -> Identity:
    """Other bytes, whose code begins with the base32 of `prefix` (hex)."""
    digest = hashlib.sha256(prefix.encode() + identity.blake3.encode()).hexdigest()
    return replace(identity, infohash_v2=prefix + digest[len(prefix) :])


def huge(size: int) -> tuple[Identity, bytes]:
    """A model of `size` bytes, and a .torrent of it that keeps every rule."""
    length = metainfo.piece_length(size)
    pieces = -(-size // length)
    layer = random.Random(size).randbytes(32 * pieces)
    root = metainfo.layer_root([layer[i : i + 32] for i in range(0, len(layer), 32)], length)
    blake3 = hashlib.sha256(str(size).encode()).hexdigest()
    name = f"{blake3}.gguf".encode()
    info = {
        b"file tree": {name: {b"": {b"length": size, b"pieces root": root}}},
        b"length": size,
        b"meta version": 2,
        b"name": name,
        b"piece length": length,
        b"pieces": bytes(20 * pieces),
    }
    torrent = encode({b"info": info, b"piece layers": {root: layer}})
    facts = metainfo.parse(torrent)
    return Identity(size, blake3, hashlib.sha256(name).hexdigest(), object_cid(name), facts.infohash, facts.infohash_v2), torrent


# -- envelopes ------------------------------------------------------------------------------------------------------------


def changed(signed: bytes, **fields: Any) -> bytes:
    return json.dumps({**json.loads(signed), **fields}).encode()


def with_wrong_signature(signed: bytes) -> bytes:
    (signature,) = json.loads(signed)["signatures"]
    raw = bytearray(base64.b64decode(signature["sig"]))
    raw[7] ^= 1
    return changed(signed, signatures=[{**signature, "sig": base64.b64encode(raw).decode()}])


def with_other_words(signed: bytes) -> bytes:
    """The name is changed and the signature is not."""
    payload = json.loads(base64.b64decode(json.loads(signed)["payload"]))
    payload["predicate"]["name"] += " of somebody else"
    return changed(signed, payload=base64.b64encode(json.dumps(payload).encode()).decode())


def without_signature(signed: bytes) -> bytes:
    return changed(signed, signatures=[])


def of_another_type(signed: bytes, key: Ed25519PrivateKey) -> bytes:
    """Rightly signed, as something that is no manifest."""
    return envelope.sign(announcement.PAYLOAD_TYPE, base64.b64decode(json.loads(signed)["payload"]), key)


def signed_by_another_name(signed: bytes) -> bytes:
    """The signature is right for a key that is not the one it names."""
    (signature,) = json.loads(signed)["signatures"]
    other = envelope.key_name(Ed25519PrivateKey.generate())
    return changed(signed, signatures=[{**signature, "keyid": other}])
