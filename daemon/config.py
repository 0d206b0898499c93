"""Settings: `config.toml` < `SWARMCTL_<SECTION>_<KEY>` < flag. Read once, frozen, the same names in all three.

A key that is not here is an error wherever it comes from: a misspelt limit must not silently mean "no limit".
The comment beside each setting is its documentation; `docs/settings.md` is checked against this file.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any, Literal, get_type_hints

from daemon.bootstrap import PUBLIC_BOOTSTRAP, check_bootstrap
from daemon.errors import UsageError
from daemon.membership import check as check_membership

Network = Literal["public", "lan", "loopback"]

# Where a node that knows no other enters the BitTorrent DHT. Whoever is met is remembered and tried before these.
DHT_BOOTSTRAP = ("dht.libtorrent.org:25401", "router.bittorrent.com:6881", "dht.transmissionbt.com:6881")
_MOST_BOOTSTRAP = 32  # each name is a lookup at start-up

LONGEST_KEEP_ALIVE = 366 * 24 * 3600  # seconds; -1 is for ever

# Names of the environment that belong to the command line and are no settings.
_RESERVED = {"SWARMCTL_HOME", "SWARMCTL_API", "SWARMCTL_TOKEN"}


@dataclass(frozen=True, slots=True)
class Api:
    host: str = "127.0.0.1"  # address the local HTTP API listens on; only loopback addresses are taken
    port: int = 8787  # 0 picks a free one; daemon.json tells which
    session_timeout: float = 1800.0  # seconds without a question after which a chat session is forgotten


@dataclass(frozen=True, slots=True)
class Ipfs:
    enabled: bool = True
    rpc: str = ""  # multiaddr or URL of a Kubo RPC to use instead of our own child
    binary: str = ""  # Kubo binary; empty: PATH, then what set-up installed
    port: int = 4001  # libp2p port of our own Kubo
    max_connections: int = 96  # Kubo's connection manager trims above this
    bootstrap: tuple[str, ...] = PUBLIC_BOOTSTRAP  # multiaddrs to enter the public network by; empty: none


@dataclass(frozen=True, slots=True)
class Torrent:
    enabled: bool = True
    port: int = 6881  # BitTorrent port
    dht_bootstrap: tuple[str, ...] = DHT_BOOTSTRAP  # HOST:PORT of DHT nodes to begin with; empty: none


@dataclass(frozen=True, slots=True)
class Swarm:
    open: bool = False  # whether strangers on the internet may reach the peer API directly; it changes nothing in lan and loopback
    host: str = ""  # address of the peer API; empty: all addresses in lan and where it is open, else 127.0.0.1
    port: int = 8788  # TCP port of the peer API; 0 picks a free one, which is the default in lan and loopback
    relay: str = "auto"  # whether to carry sealed frames for nodes that ask for it: auto (where others reach this node), on or off
    relay_bytes: bool = False  # whether to carry the bytes of models for them, too
    rendezvous: bool = True  # whether to be found on the DHTs by the codes of the models that are shared
    join: tuple[str, ...] = ()  # addresses of nodes to know from the start, separated by spaces
    heartbeat: int = 12  # seconds between announcements when nothing changes
    name: str = ""  # of a closed swarm; empty: the open one
    secret: str = field(default="", repr=False)  # of a closed swarm: whoever has it and the name is a member


@dataclass(frozen=True, slots=True)
class Transfer:
    download_rate: int = 0  # bytes per second over all pulls; 0: no limit
    upload_rate: int = 0  # bytes per second of BitTorrent upload; 0: no limit
    stall: float = 5.0  # seconds without a byte from IPFS after which BitTorrent joins
    give_up: float = 120.0  # seconds without a byte from any source after which a pull fails (it can be resumed)


@dataclass(frozen=True, slots=True)
class Engine:
    threads: int = 0  # threads of llama.cpp per model; 0: as many as there are cores that others leave
    context: int = 4096  # tokens of KV cache per served model, shared by its chats; at most what the model was trained for
    slots: int = 4  # chats answered at the same time per model
    batch: int = 512  # tokens that llama.cpp reads at once
    keep_alive: float = 300.0  # seconds without a request after which a model is unloaded; negative: never
    memory: int = 0  # bytes that loaded models may use together; 0: what the machine has free
    gpu_layers: int = -1  # layers to put on a GPU; -1: all, where llama.cpp was built for one


@dataclass(frozen=True, slots=True)
class Config:
    home: Path
    network: Network = "public"  # "public", "lan" or "loopback"
    api: Api = field(default_factory=Api)
    ipfs: Ipfs = field(default_factory=Ipfs)
    torrent: Torrent = field(default_factory=Torrent)
    swarm: Swarm = field(default_factory=Swarm)
    transfer: Transfer = field(default_factory=Transfer)
    engine: Engine = field(default_factory=Engine)


# On one machine with several nodes nobody can own a port, and in a LAN nobody needs to know that of the peer API.
_PORTS = {
    "loopback": {"api.port": 0, "ipfs.port": 0, "torrent.port": 0, "swarm.port": 0},
    "lan": {"swarm.port": 0},
}
_SECRETS = {"swarm.secret"}  # no message repeats them
_SECTIONS: dict[str, type] = {
    "api": Api,
    "ipfs": Ipfs,
    "torrent": Torrent,
    "swarm": Swarm,
    "transfer": Transfer,
    "engine": Engine,
}


def settings() -> dict[str, tuple[type, Any]]:
    """Every setting by its dotted name, with its type and default."""
    found: dict[str, tuple[type, Any]] = {"network": (str, "public")}
    for section, cls in _SECTIONS.items():
        hints = get_type_hints(cls)
        for f in dataclasses.fields(cls):
            found[f"{section}.{f.name}"] = (hints[f.name], f.default)
    return found


def load(home: Path, environ: Mapping[str, str] | None = None, flags: Mapping[str, str] | None = None) -> Config:
    """The settings in force for `home`. `flags` maps dotted names to text. Raises `UsageError` that names the culprit."""
    environ = os.environ if environ is None else environ
    given = {**_from_file(home / "config.toml"), **_from_environment(environ), **_from_flags(flags or {})}
    known = settings()
    values = {name: _convert(name, known[name][0], raw, where) for name, (raw, where) in given.items()}
    network = values.get("network", "public")
    if network not in ("public", "lan", "loopback"):
        raise UsageError("network", f"{network!r} is not a network", "use public, lan or loopback")
    values = {**_PORTS.get(network, {}), **values}
    sections = {
        section: cls(**{n.partition(".")[2]: v for n, v in values.items() if n.startswith(section + ".")})
        for section, cls in _SECTIONS.items()
    }
    config = Config(home=home, network=network, **sections)
    _check(config)
    return config


def _from_file(path: Path) -> dict[str, tuple[Any, str]]:
    try:
        parsed = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError("config.toml", f"cannot be read: {error}", "mend or remove the file") from error
    found: dict[str, tuple[Any, str]] = {}
    for key, value in parsed.items():
        entries = {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
        for name, entry in entries.items():
            if name not in settings():
                raise UsageError("config.toml", f"unknown setting {name!r}", "docs/settings.md lists them")
            found[name] = (entry, "config.toml")
    return found


def _from_environment(environ: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    by_variable = {"SWARMCTL_" + name.upper().replace(".", "_"): name for name in settings()}
    found: dict[str, tuple[Any, str]] = {}
    for variable, value in environ.items():
        if variable.startswith("SWARMCTL_") and variable not in _RESERVED:
            if variable not in by_variable:
                raise UsageError(variable, "no such setting", "docs/settings.md lists them")
            found[by_variable[variable]] = (value, variable)
    return found


def _from_flags(flags: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    return {name: (value, "--" + name.replace(".", "-").replace("_", "-")) for name, value in flags.items()}


def _convert(name: str, kind: Any, raw: Any, where: str) -> Any:
    def wrong(expected: str) -> UsageError:
        given = "" if name in _SECRETS else f", not {raw!r}"
        return UsageError(where, f"{name} must be {expected}{given}", "docs/settings.md lists the settings")

    if kind is bool:
        if isinstance(raw, bool):
            return raw
        if isinstance(raw, str) and raw.lower() in ("true", "1", "yes", "on", "false", "0", "no", "off"):
            return raw.lower() in ("true", "1", "yes", "on")
        raise wrong("true or false")
    if kind in (int, float):
        if isinstance(raw, bool) or not isinstance(raw, int | float | str):
            raise wrong("a number")
        try:
            number = _bytes(raw) if kind is int and isinstance(raw, str) else kind(raw)
        except (ValueError, OverflowError):
            raise wrong("a number") from None
        if number != number or (kind is int and isinstance(raw, float) and raw != number):
            raise wrong("a whole number" if kind is int else "a number")
        return number
    if kind is str:
        if not isinstance(raw, str):
            raise wrong("text")
        return raw
    # The only other kind is a list of texts.
    if isinstance(raw, str):
        return tuple(raw.split())
    if isinstance(raw, Sequence) and all(isinstance(item, str) for item in raw):
        return tuple(raw)
    raise wrong("a list of texts")


def host_port(text: str) -> tuple[str, int]:
    """`HOST:PORT` or `[IPv6]:PORT` as a pair. Raises `ValueError` for anything else."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]{1,253})):([0-9]{1,5})", text)
    if match is None or not 0 < int(match[3]) < 65536:
        raise ValueError(f"{text!r} is not HOST:PORT")
    if match[1] is not None:
        IPv6Address(match[1])
    return match[1] or match[2], int(match[3])


def _bytes(text: str) -> int:
    """A whole number, for sizes and rates also with a unit: `20MiB`, `1.5GB`."""
    match = re.fullmatch(r"\s*(-?\d+(?:\.\d+)?)\s*([KMGT]i?B|B)\s*", text)
    if match is None:
        return int(text)
    unit = match[2]
    return int(float(match[1]) * (1024 if "i" in unit else 1000) ** (" KMGT".index(unit[0]) if unit != "B" else 0))


def _check_bootstrap(entries: tuple[str, ...]) -> None:
    if len(entries) > _MOST_BOOTSTRAP:
        why = f"it has more than {_MOST_BOOTSTRAP} entries"
        raise UsageError("torrent.dht_bootstrap", why, "name a few nodes that are always there")
    for entry in entries:
        try:
            host_port(entry)
        except ValueError as error:
            raise UsageError("torrent.dht_bootstrap", str(error), "use HOST:PORT or [IPv6]:PORT") from None


def _check(config: Config) -> None:
    for name in ("api.port", "ipfs.port", "torrent.port", "swarm.port"):
        section, _, key = name.partition(".")
        port = getattr(getattr(config, section), key)
        if not 0 <= port <= 65535:
            raise UsageError(name, f"{port} is not a port", "use 0 to 65535")
    _check_bootstrap(config.torrent.dht_bootstrap)
    if config.api.host not in ("127.0.0.1", "::1", "localhost"):
        raise UsageError(
            "api.host", f"{config.api.host} is not a loopback address", "put a reverse proxy in front to reach it from elsewhere"
        )
    for name in ("transfer.download_rate", "transfer.upload_rate", "transfer.stall", "transfer.give_up", "engine.memory", "engine.threads"):
        section, _, key = name.partition(".")
        if getattr(getattr(config, section), key) < 0:
            raise UsageError(name, "it is less than nothing", "docs/settings.md says what 0 means")
    if not 1 <= config.api.session_timeout <= 7 * 24 * 3600:
        raise UsageError("api.session_timeout", f"{config.api.session_timeout:g} s is no time to keep a chat for", "use 1 to 604800")
    if config.engine.keep_alive > LONGEST_KEEP_ALIVE:
        raise UsageError("engine.keep_alive", f"{config.engine.keep_alive:g} s is more than a year", "use -1 for ever")
    if config.swarm.heartbeat < 1:
        raise UsageError("swarm.heartbeat", f"{config.swarm.heartbeat} s is too often", "use at least 1")
    check_membership(config.swarm.name, config.swarm.secret)
    check_bootstrap(config.ipfs.bootstrap)
    if not config.ipfs.enabled and not config.torrent.enabled:
        raise UsageError("ipfs.enabled and torrent.enabled", "both are off", "a node needs one of them")
    if config.engine.slots < 1 or config.engine.context < 64 or config.engine.batch < 64:
        why = "needs at least one slot, and 64 tokens of context and batch"
        raise UsageError("engine", why, "raise engine.slots, engine.context or engine.batch")
    if config.swarm.relay not in ("auto", "on", "off"):
        raise UsageError("swarm.relay", f"{config.swarm.relay!r} is none of the choices", "use auto, on or off")
    if config.network == "loopback" and config.swarm.host not in ("", "127.0.0.1"):
        raise UsageError("swarm.host", "a loopback node listens on 127.0.0.1 only", "remove swarm.host or set network")
