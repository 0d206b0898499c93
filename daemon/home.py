"""The data folder: its lock, the node's key, the token, and `daemon.json`, which tells others where the daemon is."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import tempfile
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from daemon.config import Network
from daemon.errors import Unavailable

_TOKEN_BYTES = 32


class Home:
    """A data folder that this process alone may use. Use as a context manager: the lock is the process's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    def __enter__(self) -> Home:
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            (self.path / "logs").mkdir(exist_ok=True)
            self._lock = os.open(self.path / "daemon.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise Unavailable(
                "data folder", f"cannot be used: {error.strerror}", "choose another with --home or mend its permissions"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            self._lock = None
            raise Unavailable(
                "daemon", "another one runs on this data folder", "swarmctl status shows it; swarmctl down ends it"
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def node_key(self) -> Ed25519PrivateKey:
        """The key that signs manifests and announcements (PKCS #8 PEM, 0600), made on first use."""
        path = self.path / "node.key"
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except FileNotFoundError:
            made = Ed25519PrivateKey.generate()
            encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
            write_private(path, made.private_bytes(encoding, form, serialization.NoEncryption()))
            return made
        except (OSError, ValueError) as error:
            # A new key would be another identity: only its owner may decide that.
            raise Unavailable("node.key", "it cannot be read", "restore it, or move it away to become a new node") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise Unavailable("node.key", "it is no Ed25519 key", "restore it, or move it away to become a new node")
        path.chmod(0o600)
        return key

    def token(self) -> str:
        """The bearer token of the local API (0600), made on first use."""
        path = self.path / "token"
        try:
            token = path.read_text(encoding="ascii").strip()
        except FileNotFoundError:
            token = ""
        except (OSError, UnicodeDecodeError) as error:
            raise Unavailable("token", "it cannot be read", "remove the file; a new one is made") from error
        if len(token) < 16:
            token = secrets.token_urlsafe(_TOKEN_BYTES)
            write_private(path, token.encode() + b"\n")
        path.chmod(0o600)
        return token

    def keep_network(self, network: Network) -> None:
        """A new data folder stays in the network that it was begun in: a later start without that flag must not go public."""
        path = self.path / "config.toml"
        if not path.exists():
            write_private(path, f'# The settings of this node; docs/settings.md lists them.\nnetwork = "{network}"\n'.encode())

    def write_daemon_json(self, url: str, version: str) -> None:
        document = {"url": url, "pid": os.getpid(), "version": version}
        write_private(self.path / "daemon.json", json.dumps(document).encode() + b"\n")

    def remove_daemon_json(self) -> None:
        (self.path / "daemon.json").unlink(missing_ok=True)


def write_private(path: Path, data: bytes) -> None:
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".")  # mkstemp makes it 0600
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except OSError as error:
        raise Unavailable(path.name, f"cannot be written: {error.strerror}", "check the data folder's space and permissions") from error
