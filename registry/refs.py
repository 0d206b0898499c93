"""What a person may type where a model is meant: a code, CID, magnet, `hf:`, URL, path or name.

Reading is by form alone, without looking anything up. In magnets, trackers (`tr=`), web seeds (`ws=`) and exact sources
(`xs=`, `as=`) are dropped: they would make this node connect wherever the link's author likes.

A parameter of our own, `x.mf=<40 hex>`, is the v1 infohash of the small torrent of the model's signed manifest
(docs/transfers.md). Other `x.` parameters but `x.pe` are ignored (BEP 9 leaves them to whoever uses them).
"""

from __future__ import annotations

import base64
import re
import unicodedata
from dataclasses import dataclass
from typing import TypeAlias
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from registry import codes, endpoints
from registry.cid import parse_cid
from registry.errors import Malformed, shown
from registry.manifest import MAX_NAME, MAX_SIZE, display_name

MAX_REF = 4096  # characters
MAX_MAGNET_FIELDS = 64
MAX_MAGNET_PEERS = 16


@dataclass(frozen=True, slots=True)
class CodeRef:
    """`code` is a full code or a prefix of one. `name` is what was typed where, without a `#`, it may as well be a name."""

    code: str
    name: str | None = None


@dataclass(frozen=True, slots=True)
class CidRef:
    """The CID of a model or a manifest, in its one spelling."""

    cid: str


@dataclass(frozen=True, slots=True)
class MagnetRef:
    """A torrent by at least one infohash; `peers` are host:port (`x.pe`), `size` bytes (`xl`).

    `manifest` is the v1 infohash, in hex, of the torrent of its signed manifest (`x.mf`).
    """

    infohash: str | None
    infohash_v2: str | None
    name: str | None = None
    peers: tuple[str, ...] = ()
    size: int | None = None
    manifest: str | None = None


@dataclass(frozen=True, slots=True)
class HfRef:
    """A repository on Hugging Face and the quantization wanted from it."""

    repo: str
    quant: str | None = None


@dataclass(frozen=True, slots=True)
class UrlRef:
    """An http or https URL of a sane form; which addresses may be connected to is decided by whoever connects."""

    url: str


@dataclass(frozen=True, slots=True)
class PathRef:
    """A local file, as typed: `~` is not expanded."""

    path: str


@dataclass(frozen=True, slots=True)
class NameRef:
    """The name of a model."""

    name: str


Ref: TypeAlias = CodeRef | CidRef | MagnetRef | HfRef | UrlRef | PathRef | NameRef

_HEX40 = re.compile(r"[0-9a-fA-F]{40}")
_BASE32 = re.compile(r"[a-zA-Z2-7]{32}")
_BTMH = re.compile(r"1220([0-9a-fA-F]{64})")
# Too long to be a name anybody gives, and begun like a CID: then a typing error must be told, not looked up as a name.
_LIKE_A_CID = re.compile(r"(baf|zdj|zb2|k2|f01)[0-9a-zA-Z]{30,}|Qm[0-9a-zA-Z]{36,}", re.IGNORECASE)
_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_QUANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")


def parse_ref(text: str) -> Ref:
    """What `text` refers to. Raises `Malformed` with the reason."""
    if len(text) > MAX_REF:
        raise Malformed(f"the reference is longer than {MAX_REF} characters")
    text = text.strip()
    if not text:
        raise Malformed("the reference is empty")
    if "\x00" in text:
        raise Malformed("the reference has a NUL in it")
    lower = text.lower()
    if lower.startswith(("ipfs://", "/ipfs/")):
        return CidRef(_bare_cid(text[len("ipfs://") :] if lower.startswith("ipfs://") else text[len("/ipfs/") :]))
    if text.startswith(("/", "./", "../", "~")) or text in (".", ".."):
        return PathRef(text)
    if lower.startswith("magnet:"):
        return _magnet(text)
    if lower.startswith("hf:"):
        return _hf(text[3:])
    if lower.startswith("file:"):
        return _file(text)
    if lower.startswith("swarmctl:"):
        raise Malformed("this is a node's address, not a model; use join")
    if "://" in text:
        return UrlRef(endpoints.http_url(text))
    return _word(text)


def magnet(
    infohash: str | None,
    infohash_v2: str | None,
    name: str,
    size: int | None,
    manifest: str | None = None,
) -> str:
    """Our magnet link: both infohashes where they are known, the name, the size, and the infohash of the manifest's
    torrent; no trackers, no web seeds (BEP 9, BEP 52)."""
    fields = []
    if infohash:
        fields.append(f"xt=urn:btih:{infohash}")
    if infohash_v2:
        fields.append(f"xt=urn:btmh:1220{infohash_v2}")
    if not fields:
        raise Malformed("a magnet needs an infohash")
    fields.append("dn=" + quote(name, safe=""))
    if size is not None:
        fields.append(f"xl={size}")
    if manifest is not None:
        fields.append(f"x.mf={manifest}")
    return "magnet:?" + "&".join(fields)


def _word(text: str) -> Ref:
    """A single word: its form tells whether it is a code, a CID, an infohash or a name."""
    if text.startswith("#"):
        return CodeRef(codes.normalise(text))
    if _HEX40.fullmatch(text):
        return MagnetRef(text.lower(), None)
    if _LIKE_A_CID.match(text) and len(text) != codes.FULL:
        return CidRef(_bare_cid(text))
    if codes.is_code(text):
        return CodeRef(codes.normalise(text), text)
    name = unicodedata.normalize("NFC", text)
    if len(name) > MAX_NAME:
        raise Malformed(f"a name has at most {MAX_NAME} characters")
    if "/" in name or "\\" in name:
        raise Malformed(f"a name has no slash: {shown(text)}; a path begins with ./ or /")
    if display_name(name) != name:
        raise Malformed(f"not a name: {shown(text)}")
    return NameRef(name)


def _bare_cid(text: str) -> str:
    text = text.removesuffix("/")
    if "/" in text or "?" in text or "#" in text:
        raise Malformed("only a CID can be pulled, not a path below one")
    return parse_cid(text).canonical


def _hf(text: str) -> HfRef:
    repo, colon, quant = text.partition(":")
    if not _REPO.fullmatch(repo) or ".." in repo or (colon and not _QUANT.fullmatch(quant)):
        raise Malformed(f"not hf:owner/repo[:quant]: {shown(text)}")
    return HfRef(repo, quant or None)


def _file(text: str) -> PathRef:
    try:
        parts = urlsplit(text)
        path = unquote(parts.path, errors="strict")
    except ValueError:
        raise Malformed(f"not a file URL: {shown(text)}") from None
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or not path.startswith("/") or "\x00" in path:
        raise Malformed(f"not the URL of a local file: {shown(text)}")
    return PathRef(path)


def _magnet(text: str) -> MagnetRef:
    try:
        query = text[len("magnet:") :].removeprefix("?")
        fields = parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=MAX_MAGNET_FIELDS)
    except ValueError:
        raise Malformed("the magnet does not parse") from None
    found: dict[str, str] = {}
    names: list[str] = []
    peers: list[str] = []
    sizes: list[str] = []
    manifests: set[str] = set()
    for key, value in fields:
        if re.fullmatch(r"xt(\.[0-9]+)?", key):
            kind, infohash = _topic(value)
            if kind and found.setdefault(kind, infohash) != infohash:
                raise Malformed("the magnet names two torrents")
        elif key == "dn":
            names.append(value)
        elif key == "x.pe":
            peers.append(endpoints.host_port(value))
        elif key == "xl":
            sizes.append(value)
        elif key == "x.mf":
            manifests.add(_manifest(value))
    if not found:
        raise Malformed("the magnet has no BitTorrent infohash")
    if len(peers) > MAX_MAGNET_PEERS:
        raise Malformed(f"the magnet has more than {MAX_MAGNET_PEERS} peers")
    if len(manifests) > 1:
        raise Malformed("the magnet names two manifests")
    return MagnetRef(
        found.get("btih"),
        found.get("btmh"),
        name=display_name(names[0]) if names and names[0] else None,
        peers=tuple(dict.fromkeys(peers)),
        size=_size(sizes),
        manifest=next(iter(manifests), None),
    )


def _manifest(value: str) -> str:
    """What cannot be read must not be left out: the magnet would lead to an unsigned model."""
    if not _HEX40.fullmatch(value):
        raise Malformed("the infohash of the magnet's manifest does not have its form")
    return value.lower()


def _topic(value: str) -> tuple[str | None, str]:
    """`("btih" | "btmh", hex)` of an exact topic; `(None, "")` for topics that are no torrents."""
    kind, _, digest = value.partition(":")[2].partition(":")
    if kind == "btih":
        if _HEX40.fullmatch(digest):
            return kind, digest.lower()
        if _BASE32.fullmatch(digest):
            return kind, base64.b32decode(digest.upper()).hex()
        raise Malformed("the magnet's v1 infohash does not have its form")
    if kind == "btmh":
        match = _BTMH.fullmatch(digest)
        if match is None:
            raise Malformed("the magnet's v2 infohash does not have its form")
        return kind, match[1].lower()
    return None, ""


def _size(sizes: list[str]) -> int | None:
    if not sizes:
        return None
    if not re.fullmatch(r"[0-9]{1,15}", sizes[0]) or not 0 < int(sizes[0]) <= MAX_SIZE:
        raise Malformed("the magnet's size does not have its form")
    return int(sizes[0])
