"""What a stranger announces about itself moves this node as little as it can: where it connects to, and how often."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from daemon.gossip.exchange import Words
from daemon.peerapi.rests import FIRST_S, Rests
from registry import announcement
from registry.envelope import key_name, sign
from registry.records import Address, Announcement, Peer
from tests.functional.swarm_nodes import Node, swarm_node, until


class Victim:
    """A web server that has nothing to do with the swarm: it has nothing for anybody, and counts who calls."""

    def __init__(self) -> None:
        self.callers = 0
        self.url = ""

    async def refuse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.callers += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Victim]:
        async with await asyncio.start_server(self.refuse, "127.0.0.1", 0) as server:
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            yield self


class Liar:
    """A key without a node, that announces the address of somebody else."""

    def __init__(self, url: str) -> None:
        self.key = Ed25519PrivateKey.generate()
        self.node = key_name(self.key)
        self.url = url
        self.sequence = 0

    def beat(self, pages: int = 0) -> bytes:
        """A word that names so many pages."""
        self.sequence += 1
        address = Address(self.node, http=(self.url,))
        expires = int(time.time()) + 600
        said = Announcement(
            self.node, None, self.sequence, expires, address, (), (), revisions=(1,) * pages
        )
        return sign(announcement.PAYLOAD_TYPE, announcement.build(said), self.key)


@pytest.mark.parametrize("network", ["public", "loopback"])
async def test_an_old_friend_is_sought_only_where_the_network_leads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, network: str
) -> None:
    """R42: whoever is remembered said itself where it is, and may have said that it is in here."""
    caplog.set_level(logging.DEBUG, "daemon.gossip.joining")
    async with Victim().listening() as victim:
        async with swarm_node(tmp_path / "a", network="public") as a:
            await a.gossip.receive(Liar(victim.url).beat())
        before = victim.callers
        async with swarm_node(tmp_path / "a", network=network):  # type: ignore[arg-type]  # given above
            await until(lambda: "an old friend cannot be reached" in caplog.text)
    assert before == 0
    assert (victim.callers > 0) == (network == "loopback")


async def quiet(node: Node) -> None:
    """Everybody who is to be told has been, or could not be."""
    await until(lambda: not any(name.startswith("tell") for name in node.supervisor.state()))


async def test_a_node_that_cannot_be_reached_is_left_alone(tmp_path: Path) -> None:
    """R42: a key announces somebody else's address, and speaks on through others: that address is called once, then rarely."""
    now = [0.0]
    async with Victim().listening() as victim, swarm_node(tmp_path / "a") as a:
        a.gossip.meeting.rests = Rests(lambda: now[0])
        liar = Liar(victim.url)

        async def speak(times: int) -> int:
            """How often the victim is called meanwhile, by beats and by pages heard over pubsub."""
            before = victim.callers
            for _ in range(times):
                said = await a.gossip.receive(liar.beat())
                a.gossip.http.spread(said)
                await quiet(a)
                await a.gossip.http.say(await a.gossip.own_news(0, ()), news=True)
                await quiet(a)
            return victim.callers - before

        assert await speak(10) == 1
        for pause_s in (FIRST_S, 2 * FIRST_S, 4 * FIRST_S):
            now[0] += pause_s - 1
            assert await speak(3) == 0
            now[0] += 1
            assert await speak(3) == 1
        # It comes itself, and is called once more.
        await a.gossip.http.exchange(Words([liar.beat()]))
        assert await speak(3) == 1


async def test_pages_are_not_asked_for_where_nobody_is(tmp_path: Path) -> None:
    """R42: the same for a key that names pages which it never gives."""
    async with Victim().listening() as victim, swarm_node(tmp_path / "a") as a:
        a.gossip.meeting.rests = Rests(lambda: 0.0)
        a.gossip.transports.clear()
        liar = Liar(victim.url)
        await a.gossip.receive(liar.beat(pages=2))
        await until(lambda: a.gossip.meeting.rests.resting(liar.node))
        for _ in range(9):
            await a.gossip.wants._ask(liar.node)
        assert victim.callers == 1


async def test_who_could_not_be_reached_is_told_again_once_it_comes(tmp_path: Path) -> None:
    async with swarm_node(tmp_path / "a") as a, swarm_node(tmp_path / "b") as b:
        await b.gossip.join(a.gossip.pages.address())
        await quiet(a)
        a.gossip.meeting.rests.begin(b.key)
        b.holds()
        await b.gossip.meeting.tell(a.peer(), await b.gossip.own_news(0, ()))
        assert not a.gossip.meeting.rests.resting(b.key)


async def test_whom_another_passes_on_has_not_come(tmp_path: Path) -> None:
    async with (
        Victim().listening() as victim,
        swarm_node(tmp_path / "a") as a,
        swarm_node(tmp_path / "b") as b,
    ):
        a.gossip.meeting.rests = Rests(lambda: 0.0)
        b.gossip.transports.clear()  # b calls nobody
        liar = Liar(victim.url)
        await a.gossip.receive(liar.beat())
        await until(lambda: a.gossip.meeting.rests.resting(liar.node))
        await b.gossip.receive(liar.beat())
        await b.gossip.join(a.gossip.pages.address())
        assert a.table.peer(liar.node) == b.table.peer(liar.node)
        await a.gossip.http.say(await a.gossip.own_news(0, ()), news=True)
        await quiet(a)
        assert victim.callers == 1


async def test_a_crash_while_telling_somebody_is_not_the_last_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = asyncio.Event()

    async def crash(peer: Peer, words: Sequence[bytes]) -> None:
        raise RuntimeError("a bug")

    async def tell(peer: Peer, words: Sequence[bytes]) -> None:
        told.set()

    async with swarm_node(tmp_path / "a") as a:
        a.gossip.transports.clear()
        peer = Peer("ed25519:" + "07" * 32, None, Address(""), 0, 0)
        monkeypatch.setattr(a.gossip.meeting, "tell", crash)
        a.gossip.http._tell(peer)
        await until(lambda: a.supervisor.state()[f"tell {peer.node}"].state == "crashed")
        monkeypatch.setattr(a.gossip.meeting, "tell", tell)
        a.gossip.http._tell(peer)
        await asyncio.wait_for(told.wait(), 20)


def page(number: int) -> Announcement:
    return Announcement(f"ed25519:{number:064x}", "peer", 1, 1, Address(""), (), (), 0, (1,))


async def test_of_many_on_pubsub_a_few_tell_who_has_no_ipfs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each draws for itself; whoever a node without IPFS spoke to always tells it."""
    async with swarm_node(tmp_path / "a") as a:
        web = Liar("http://127.0.0.1:9")
        await a.gossip.receive(web.beat())
        await until(lambda: a.gossip.meeting.rests.resting(web.node))
        a.gossip.meeting.rests.end(web.node)
        told: list[str] = []
        monkeypatch.setattr(a.gossip.http, "_tell", lambda peer: told.append(peer.node))
        monkeypatch.setattr(a.table, "count", lambda: 300)
        for number in range(3000):
            a.gossip.http.spread(page(number))
        assert 10 <= len(told) <= 70  # 30 are expected
        told.clear()
        await a.gossip.http.exchange(Words([web.beat()]))
        for number in range(10):
            a.gossip.http.spread(page(number))
        assert told == [web.node] * 10
