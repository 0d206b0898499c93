"""What this node hears, whichever way it comes: believed if the rules of registry/announcement.py hold."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from daemon.errors import Busy, Refused, SwarmError
from daemon.gossip.clocks import Clocks
from daemon.gossip.peers import PeerTable
from registry.errors import Malformed, Misdated, NotVerified, Repeated, Stale
from registry.records import Announcement

_log = logging.getLogger(__name__)

REFUSALS = (Malformed, NotVerified, Stale, Refused, Busy)  # what is wrong with an announcement


class Ear:
    """`greet` is called when a node is new here, or says hello; it wants to hear of us. `pass_on` takes what a node without
    IPFS said, for those whom only pubsub reaches. `behind` is called when a page of a node is missing here.
    """

    def __init__(
        self,
        table: PeerTable,
        *,
        greet: Callable[[], None],
        pass_on: Callable[[bytes], None],
        behind: Callable[[], None],
    ) -> None:
        # Nodes of the table that said something since the start, or since IPFS came back.
        self.heard: set[str] = set()
        table.on_forget = self.heard.discard
        self._table = table
        self._greet = greet
        self._pass_on = pass_on
        self._behind = behind
        self._refusal = ""
        self._clocks = Clocks(table.alive, time.monotonic)

    async def receive(self, envelope: bytes) -> Announcement:
        """Believe an announcement if it holds. Raises `Malformed`, `NotVerified`, `Stale`, `Refused` or `Busy`."""
        try:
            said = self._table.accept(envelope)
        except REFUSALS as error:
            self._note(error)
            raise
        self._clocks.dated_right(said.node)
        if self._table.is_behind(said.node):
            self._behind()
        new = said.node not in self.heard
        self.heard.add(said.node)
        if new or said.hello:
            self._greet()
        return said

    async def take_in(self, envelopes: Sequence[bytes]) -> list[Announcement | str]:
        """Several envelopes that came together over HTTP: what each says, or why it was refused.

        A wrong one does not stop the others: whoever passes it on need not have written it.
        """
        heard: list[Announcement | str] = []
        for envelope in envelopes:
            try:
                said = await self.receive(envelope)
            except REFUSALS as error:
                heard.append(error.why if isinstance(error, SwarmError) else str(error))
                continue
            heard.append(said)
            if said.peer_id is None:
                self._pass_on(envelope)
        return heard

    @property
    def clock_is_off(self) -> bool:
        """Whether most others have another time than we: then it is more likely ours that is wrong."""
        return self._clocks.ours_is_off

    def forget(self) -> None:
        """Whoever was heard has to be reached again."""
        self.heard.clear()

    def _note(self, error: Exception) -> None:
        if isinstance(error, Misdated):
            self._clocks.dated_wrong(error)
        # The same reason again and again, as from a node whose clock is off, is one line in the log.
        if str(error) != self._refusal and not isinstance(error, Repeated):
            self._refusal = str(error)
            _log.info("an announcement was refused: %s", error)
