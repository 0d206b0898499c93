"""Who answers a question: candidates in the order of the routing rule, tried until one gives the first piece of its answer."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import aiohttp

from daemon.answering.local import LocalModel
from daemon.engine.interface import Delta, EmbeddingRequest, Embeddings, Provider, Request
from daemon.errors import (
    Ambiguous,
    BackendError,
    CallerError,
    InferenceError,
    NotFound,
    PeerError,
    SwarmError,
    Unreachable,
    Unserved,
    UsageError,
)
from daemon.gossip.peers import PeerTable
from daemon.gossip.rendezvous import Search
from daemon.peerapi.ways import AUTO, CONNECT_S, NEVER, Ways
from daemon.peerchat.provider import PeerProvider
from daemon.waiting import close
from registry import codes, routing
from registry.errors import AmbiguousRef, Malformed
from registry.records import Offer
from registry.routing import Choice

T = TypeVar("T")
_log = logging.getLogger(__name__)

CANDIDATES_TRIED = 5
QUICK_S = 1.0  # for one of several candidates to be reached, at first


class Deltas:
    """The rest of an answer. Leaving it early is `aclose()`, which cancels the generation where it runs."""

    def __init__(self, first: Delta, rest: AsyncIterator[Delta], ended: Callable[[bool], None]) -> None:
        self._first: Delta | None = first
        self._rest = rest
        self._ended = ended
        self._finished = False

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        if self._finished:
            raise StopAsyncIteration
        delta, self._first = self._first, None
        if delta is None:
            try:
                delta = await anext(self._rest)
            except (StopAsyncIteration, SwarmError) as error:
                await self._end(well=False)
                if isinstance(error, SwarmError):
                    raise
                raise InferenceError("answer", "it ended without saying how", "ask again") from None
        if delta.finish is not None:
            await self._end(well=True)
        return delta

    async def aclose(self) -> None:
        """Idempotent. Says nothing about the node: whoever leaves early has their own reasons."""
        self._finished = True
        await close(self._rest)

    async def _end(self, *, well: bool) -> None:
        self._ended(well)
        await self.aclose()


@dataclass(frozen=True, slots=True)
class Answered:
    """`answered_by` is a node key, `code` the full code of the model, `via` the node that relays the answer, if one does."""

    answered_by: str
    code: str
    name: str
    via: str | None


@dataclass(frozen=True, slots=True)
class Answer(Answered):
    """An answer that has begun."""

    deltas: Deltas


@dataclass(frozen=True, slots=True)
class Embedded(Answered):
    embeddings: Embeddings


class Answers:
    """`local` are the models that this node's user may ask here, served or not, and `held` offers them; `http` is shared with
    the rest of the daemon, `clock` gives unix seconds, `search` looks for nodes on the DHTs.
    """

    def __init__(
        self,
        table: PeerTable,
        local: Callable[[], Sequence[LocalModel]],
        held: Callable[[], Sequence[Offer]],
        *,
        ways: Ways,
        http: aiohttp.ClientSession,
        clock: Callable[[], float],
        search: Search,
    ) -> None:
        self._search = search
        self._table = table
        self._local = local
        self._held = held
        self._ways = ways
        self._http = http
        self._clock = clock

    async def open(self, model: str | None, request: Request, *, via: str = AUTO) -> Answer:
        """The first answer that begins. `model` is a code, CID, magnet or name; None leaves the choice to the routing rule.

        `via` is `auto`, `never` (no relay) or the node key of the relay through which the answer must come.

        Raises `NotFound`, `Ambiguous` or `UsageError` for `model`, `Unserved` when nobody answered (with each reason), and
        what the caller must change (`UsageError`) when that is why nobody did.
        """
        return await self._first(model, via, lambda choice, provider: self._begin(choice, provider, request))

    async def embed(self, model: str | None, request: EmbeddingRequest) -> Embedded:
        """The vectors of the first that gives them. Raises as `open` does."""
        return await self._first(model, AUTO, lambda choice, provider: self._embed(choice, provider, request))

    async def _first(
        self, model: str | None, via: str, ask: Callable[[Choice, Provider], Awaitable[T]]
    ) -> T:
        """What the first candidate that does not fail says to `ask`.

        Where several could answer, none that is gone holds the question up: each is given a second to be reached, and those that
        took longer are tried again with patience before this node loads what it only holds.
        """
        local = {one.offer.cid: one for one in self._local()}
        choices = await self._found(model, local, via)
        serving = [choice for choice in choices if choice.offer.serving]
        failures: dict[Choice, SwarmError] = {}
        waiting = deque((choice, QUICK_S if len(serving) > 1 else CONNECT_S) for choice in serving)
        held = [choice for choice in choices if not choice.offer.serving]
        while waiting or held:
            choice, connect_s = waiting.popleft() if waiting else (held.pop(0), CONNECT_S)
            provider = self._provider(choice, local, via, connect_s)
            if provider is None:
                continue
            try:
                return await ask(choice, provider)
            except (CallerError, PeerError, BackendError) as error:
                _log.info("%s did not answer: %s", _who(choice), error)
                failures[choice] = error
                if isinstance(error, Unreachable) and connect_s < CONNECT_S:
                    waiting.append((choice, CONNECT_S))
        raise _nobody(model, list(failures.items()), via)

    async def _found(
        self, model: str | None, local: Mapping[str, LocalModel], via: str
    ) -> list[Choice]:
        """The candidates; looked for on the DHTs where none is known.

        Who names a relay does not want to be seen by those who serve the model: a search would meet them with its code.
        """
        try:
            return self._candidates(model, local)
        except (NotFound, Unserved):
            if via not in (AUTO, NEVER):
                raise
            await self._search(model, lambda: self._is_served(model, local))
            return self._candidates(model, local)

    def _is_served(self, model: str | None, local: Mapping[str, LocalModel]) -> bool:
        try:
            return bool(self._candidates(model, local))
        except (NotFound, Unserved):
            return False

    def _candidates(self, model: str | None, local: Mapping[str, LocalModel]) -> list[Choice]:
        """Whom to ask, best first; at least one. What this node only holds comes last, and is loaded when it is asked."""
        held = self._held()
        if model is None:
            held = [offer for offer in held if offer.cid not in local or local[offer.cid].usable]
        try:
            table = self._table
            offers = table.offers() if model is None else table.offers_about(model, held)
            found = routing.candidates(offers, wanted=model, local=held, stats=table.stats())
        except AmbiguousRef as error:
            told = ", ".join(codes.told_apart(error.candidates))
            raise Ambiguous(str(model), f"means {len(error.candidates)} models: {told}", "use a longer code or the CID") from error
        except Malformed as error:
            raise UsageError(str(model), str(error), "use a code, a CID or a name") from error
        if model is not None and not found:
            raise NotFound(model, "no node that this one knows has it", "swarmctl models lists what there is; swarmctl join adds a node")
        serving = [choice for choice in found if choice.offer.serving][:CANDIDATES_TRIED]
        here = [choice for choice in found if choice.local and choice not in serving and choice.offer.cid in local]
        if not serving and not here:
            what, why = ("model", "nobody serves any now") if model is None else (model, "nobody serves it now")
            raise Unserved(what, why, "swarmctl pull brings it here, where it can be asked")
        return serving + here

    def _provider(
        self, choice: Choice, local: Mapping[str, LocalModel], via: str, connect_s: float
    ) -> Provider | None:
        if choice.local:
            here = local.get(choice.offer.cid)
            # Who names a relay wants the answer from behind it.
            return here.provider if here is not None and via in (AUTO, NEVER) else None
        peer = self._table.peer(choice.offer.node)
        if peer is None:
            return None
        return PeerProvider(
            peer,
            choice.offer.cid,
            ways=self._ways,
            http=self._http,
            clock=self._clock,
            via=via,
            connect_s=connect_s,
        )

    async def _begin(self, choice: Choice, provider: Provider, request: Request) -> Answer:
        node = choice.offer.node
        deltas = provider.generate(request)
        began = time.monotonic()
        try:
            first = await anext(deltas, None)
            if first is None:
                raise Unserved("peer", "it ended its answer before it began")
        except BaseException as error:
            await close(deltas)
            self._note_failure(choice, error)
            raise
        latency = time.monotonic() - began

        def ended(well: bool) -> None:
            if not choice.local:
                self._table.record(node, latency, ok=well)

        told = (node, _code(choice.offer), choice.offer.name, _via(provider))
        return Answer(*told, Deltas(first, deltas, ended))

    async def _embed(self, choice: Choice, provider: Provider, request: EmbeddingRequest) -> Embedded:
        node = choice.offer.node
        try:
            embeddings = await provider.embed(request)
        except SwarmError as error:
            self._note_failure(choice, error)
            raise
        if not choice.local:
            # Its time says nothing of the time to a first token.
            self._table.record(node, None, ok=True)
        return Embedded(node, _code(choice.offer), choice.offer.name, _via(provider), embeddings)

    def _note_failure(self, choice: Choice, error: BaseException) -> None:
        """What the caller did wrong, or a question that was given up, says nothing about the node."""
        if not choice.local and isinstance(error, PeerError | BackendError):
            self._table.record(choice.offer.node, None, ok=False)


def _code(offer: Offer) -> str:
    return codes.codes_of(offer.cid, offer.infohash_v2)[0]


def _via(provider: Provider) -> str | None:
    return provider.relayed_by if isinstance(provider, PeerProvider) else None


def _who(choice: Choice) -> str:
    return "this node" if choice.local else choice.offer.node[:16]


def _nobody(
    model: str | None, failures: Sequence[tuple[Choice, SwarmError]], via: str
) -> SwarmError:
    """The one error for all that was tried: the caller's fault if it was, else who failed and why."""
    for _, error in failures:
        if isinstance(error, CallerError) and not isinstance(error, NotFound):
            return error
    if len(failures) == 1 and failures[0][0].local:
        return failures[0][1]
    reasons = "; ".join(_reason(choice, error) for choice, error in failures)
    if via not in (AUTO, NEVER):
        hint = "name a relay of a node that serves it (swarmctl peers), or leave --via out"
        nobody = "no other node that serves it is known"
        return Unserved(model or "question", reasons or nobody, hint)
    gone = "the nodes that serve it are not known any more"
    return Unserved(model or "question", reasons or gone, "try again, or serve it here")


def _reason(choice: Choice, error: SwarmError) -> str:
    return f"{_who(choice)}: {error.why}"
