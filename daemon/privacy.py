"""Who learns what of this node with its present settings, for `swarmctl privacy`. Pure.

One function for each of those who learn something; it says nothing where they cannot be met. The
texts are for the owner of the node. What they promise is held by the code that they speak of:
peerchat/seal.py, relaying, gossip, the two DHTs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from daemon.config import Config


@dataclass(frozen=True, slots=True)
class Facts:
    """What the settings do not say: how the node is now."""

    models: int  # models here; all are announced
    serving: int  # of them served, and those of upstreams
    upstreams: int  # models of other servers that are served here
    relays: int  # nodes that carry for this one
    relaying: bool  # this node carries for others that ask it to
    closed: bool  # a closed swarm: its name and secret are set


@dataclass(frozen=True, slots=True)
class Exposure:
    """`who` `learns` what, `because` of what, and what would `change` it; empty: nothing does."""

    who: str
    learns: str
    because: str
    change: str


def exposures(config: Config, facts: Facts) -> list[Exposure]:
    """All that somebody learns now, nearest first; what nobody learns comes last."""
    told = (tell(config, facts) for tell in _TOLD)
    return [exposure for exposure in told if exposure is not None]


# -- asking and answering -------------------------------------------------------------------------


def _server(config: Config, facts: Facts) -> Exposure:
    if config.network == "loopback":
        learns = "the prompt and the answer"
        change = ""
    else:
        learns = "the prompt, the answer, and your address or your IPFS peer id"
        change = "ask --via NODE hides your address from it, and its address from you"
    because = "whoever computes an answer reads the question; it is sealed for everybody else"
    return Exposure("the node that answers your question", learns, because, change)


def _carrier(config: Config, facts: Facts) -> Exposure | None:
    """The relay of a question that this node asks."""
    if config.network == "loopback":
        return None
    return Exposure(
        "a relay that carries your question",
        "how much goes through it and when, both nodes' keys and addresses; nothing of the text",
        "where no direct way works, ask takes a relay of the serving node; the frames are sealed",
        "ask --via never takes none",
    )


def _upstream(config: Config, facts: Facts) -> Exposure | None:
    if not facts.upstreams:
        return None
    return Exposure(
        "the servers behind your upstreams",
        "the prompts that you and others ask their models, and the answers; not who asked",
        "serve --upstream hands the question on to them",
        "swarmctl stop REF, for each of them",
    )


# -- being there ----------------------------------------------------------------------------------


def _listeners(config: Config, facts: Facts) -> Exposure:
    if config.network == "loopback":
        who = "nodes of this machine that were joined"
    elif facts.closed:
        who = "the members of your closed swarm"
    elif config.network == "lan":
        who = "every node of your LAN that listens"
    else:
        who = "everybody who listens to the swarm"
    models = f"which models are here ({facts.models}) and which are served ({facts.serving})"
    change = "swarmctl rm takes a model off the list, swarmctl stop off what is served"
    if not facts.closed and config.network != "loopback":
        change += "; swarm.name and swarm.secret make the swarm a closed one"
    because = "a node announces itself, signed, over pubsub and HTTP"
    return Exposure(who, f"your node key, your addresses, {models}", because, change)


def _strangers(config: Config, facts: Facts) -> Exposure | None:
    if config.network != "public" or not config.swarm.open:
        return None
    if facts.closed:
        learns = "that something listens at your address; it answers members only"
    else:
        learns = "your address, your node key, and every announcement that this node passes on"
    return Exposure(
        "anybody on the internet who finds the port of your peer API",
        learns,
        "swarm.open lets strangers reach it",
        "swarm.open = false",
    )


def _own_relays(config: Config, facts: Facts) -> Exposure | None:
    if not facts.relays:
        return None
    learns = "your address, when you are there, how much is carried and when; nothing of the text"
    change = "a forwarded port makes relays needless"
    if config.network == "public" and config.swarm.rendezvous:
        change += "; swarm.rendezvous = false keeps your codes off the DHTs"
        learns += (
            ". On the DHTs they announce your codes under their own address, "
            "so they know which models you hold"
        )
    one = facts.relays == 1
    carriers = "the node that carries" if one else f"the {facts.relays} nodes that carry"
    return Exposure(
        f"{carriers} for this one",
        learns,
        "nobody can dial this node directly, so they keep a way to it open",
        change,
    )


def _carried(config: Config, facts: Facts) -> Exposure | None:
    """Those for whom this node is the relay, and whoever looks for them."""
    if not facts.relaying:
        return None
    carried = "sealed chats, manifests and announcements"
    if config.swarm.relay_bytes:
        carried += ", and the bytes of models"
    return Exposure(
        "the nodes that you carry for, and whoever reaches them through you",
        "your address; on the DHTs it stands for theirs. "
        f"You carry {carried}, and see sizes, times and addresses",
        f'swarm.relay is "{config.swarm.relay}"',
        'swarm.relay = "off"',
    )


# -- IPFS and BitTorrent --------------------------------------------------------------------------


def _libp2p(config: Config, facts: Facts) -> Exposure | None:
    if not config.ipfs.enabled or config.network == "loopback":
        return None
    if config.network == "lan":
        who = "IPFS nodes of your LAN"
        learns = "your address and peer id, and which CIDs you look for or hold"
        because = "mDNS calls it out in the LAN, and blocks are asked for by their CID"
    else:
        who = "IPFS nodes that you are connected to, and whoever asks the IPFS DHT"
        learns = (
            "your address and peer id, and which CIDs you look for or hold. "
            "The DHT may keep what it was told for up to 48 hours after you hold it no more"
        )
        because = "blocks are found and asked for by their CID"
    return Exposure(who, learns, because, "ipfs.enabled = false")


def _bittorrent(config: Config, facts: Facts) -> Exposure | None:
    if not config.torrent.enabled or config.network == "loopback":
        return None
    if config.network == "lan":
        who = "BitTorrent peers of your LAN"
        because = "local service discovery calls infohashes out in the LAN"
    else:
        who = "the BitTorrent peers of a model, and whoever asks the BitTorrent DHT"
        because = "who seeds or fetches a torrent is found by its infohash"
    learns = "your address, and that you hold or fetch that infohash"
    return Exposure(who, learns, because, "torrent.enabled = false")


def _introductions(config: Config, facts: Facts) -> Exposure | None:
    """Two nodes that cannot be dialled tell each other where to dial, see transfer/introductions.py."""
    if not config.torrent.enabled or config.network == "loopback":
        return None
    asker = "members of your closed swarm" if facts.closed else "whoever"
    verb = "ask" if facts.closed else "asks"
    return Exposure(
        f"{asker} that {verb} this node for a torrent that it holds, and holders of one that you fetch",
        "the outside address and the port of your BitTorrent, also where a relay carries the question",
        "both sides of a transfer dial at once, so that it gets through their routers",
        "torrent.enabled = false",
    )


def _rendezvous(config: Config, facts: Facts) -> Exposure | None:
    if config.network != "public" or not config.swarm.rendezvous:
        return None
    if facts.closed:
        who = "whoever has the secret of your closed swarm"
        learns = "the addresses under which its members are met"
    else:
        who = "whoever knows the code of a model"
        learns = (
            "the addresses of those who hold it: yours, or your relays'. "
            "The swarm's key, which is no secret, shows who takes part"
        )
    return Exposure(
        who,
        learns,
        "swarm.rendezvous announces a key for the swarm and one for each code on the DHTs, "
        "so that a code alone is enough to find you",
        "swarm.rendezvous = false: others then need an address to join, or the swarm's pubsub. "
        "What the DHTs were told runs out: BitTorrent's in half an hour, IPFS's within 48 hours",
    )


def _bootstrap(config: Config, facts: Facts) -> Exposure | None:
    if config.network != "public":
        return None
    settings: dict[str, str] = {}  # and what each one's hosts see here
    if config.ipfs.enabled and config.ipfs.bootstrap:
        settings["ipfs.bootstrap"] = "IPFS"
    if config.torrent.enabled and config.torrent.dht_bootstrap:
        settings["torrent.dht_bootstrap"] = "BitTorrent"
    if not settings:
        return None
    return Exposure(
        "the bootstrap hosts",
        f"your address, and that you run {_a_node(settings.values())}",
        "a node that remembers nobody enters the DHTs through them",
        f"{' and '.join(settings)} name others, or none",
    )


def _a_node(networks: Iterable[str]) -> str:
    kinds = " and ".join(networks)
    article = "an" if kinds.startswith("IPFS") else "a"
    return f"{article} {kinds} node"


# -- here, and nowhere ----------------------------------------------------------------------------


def _machine(config: Config, facts: Facts) -> Exposure:
    return Exposure(
        "programs of this machine that can read the file `token` of the data folder",
        "everything that the API tells, and they can ask and change whatever you can",
        f"the API listens on {config.api.host} and wants that token",
        "keep the token to yourself; it is in `swarmctl env` too",
    )


def _nobody(config: Config, facts: Facts) -> Exposure:
    return Exposure(
        "nobody",
        "what you ask a model that answers here. There is no account and no telemetry",
        "it stays on this machine, and the daemon writes nothing of it to disk",
        "",
    )


_TOLD: tuple[Callable[[Config, Facts], Exposure | None], ...] = (
    _server,
    _carrier,
    _upstream,
    _listeners,
    _strangers,
    _own_relays,
    _carried,
    _libp2p,
    _bittorrent,
    _introductions,
    _rendezvous,
    _bootstrap,
    _machine,
    _nobody,
)
