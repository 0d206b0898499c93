"""The models that this node answers for from somewhere else: OpenAI-compatible servers that its user named.

They live in memory alone, because a key is not written to disk: after a restart each has to be served again.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from daemon.answering.local import LocalModel
from daemon.config import Network
from daemon.engine.upstream.form import base_url
from daemon.engine.upstream.provider import Limits, UpstreamProvider
from daemon.engine.upstream.reach import open_session
from daemon.errors import Ambiguous, NotFound, UsageError
from registry import codes, refs, upstream
from registry.errors import Malformed
from registry.manifest import MAX_NAME
from registry.records import Offer

_LISTED = 10  # names in an error
_KEY = re.compile(r"[\x21-\x7e]{1,4096}")  # what may stand in a header


@dataclass(frozen=True, slots=True)
class Upstream:
    """One model of one upstream. `model` is what the upstream calls it, `offer` what the swarm sees."""

    model: str
    offer: Offer
    provider: UpstreamProvider

    @property
    def slots(self) -> int:
        return self.provider.limits.slots

    @property
    def free_slots(self) -> int:
        return self.provider.free_slots

    @property
    def code(self) -> str:
        """The full code."""
        return codes.code_of_cid(self.offer.cid)


class Upstreams:
    """`node` is this node's key, `on_change` is called when something is served or stopped."""

    def __init__(self, node: str, network: Network, on_change: Callable[[], None]) -> None:
        self._node = node
        self._network = network
        self._on_change = on_change
        self._served: dict[str, Upstream] = {}  # by CID

    async def serve(self, url: str, model: str, key: str | None, slots: int | None) -> Upstream:
        """Answer as `model` of the server at `url` from now on; one of the same name is replaced.

        Raises `UsageError`, `NotFound` when the server lists other models, and what `UpstreamProvider.models` does.
        """
        made = self._make(url, model, key, Limits() if slots is None else Limits(slots=slots))
        try:
            listed = await made.provider.models()
            if listed is not None and model not in listed:
                raise _unlisted(model, listed)
        except BaseException:
            await made.provider.close()
            raise
        before = self._served.get(made.offer.cid)
        self._served[made.offer.cid] = made
        self._on_change()
        if before is not None:
            await before.provider.close()
        return made

    def _make(self, url: str, model: str, key: str | None, limits: Limits) -> Upstream:
        if key is not None and not _KEY.fullmatch(key):
            raise UsageError("upstream", "its key has characters that no key has", "look for spaces and line ends in it")
        try:
            if len(model) > MAX_NAME:
                raise Malformed(f"a name has at most {MAX_NAME} characters")
            base, offer = base_url(url), upstream.offer(self._node, model, limits.slots)
        except Malformed as error:
            raise UsageError("upstream", str(error), "give a URL like http://127.0.0.1:11434/v1, and a model that it lists") from error
        session = open_session(base, self._network, with_key=key is not None)
        return Upstream(model, offer, UpstreamProvider(base, model, key, session, limits))

    async def stop(self, served: Upstream) -> None:
        """Answer for it no more; answers under way are broken off. Idempotent."""
        if self._served.get(served.offer.cid) is served:
            del self._served[served.offer.cid]
            self._on_change()
        await served.provider.close()

    async def close(self) -> None:
        """Idempotent."""
        while self._served:
            _, served = self._served.popitem()
            await served.provider.close()

    def served(self) -> list[Upstream]:
        return list(self._served.values())

    def find(self, text: str) -> Upstream | None:
        """What a code, a CID or a name means, the upstream's own name included. Raises `Ambiguous`."""
        found = [one for one in self._served.values() if text == one.model or _means(text, one)]
        if len(found) > 1:
            told = ", ".join(codes.told_apart([one.code for one in found]))
            raise Ambiguous(text[:80], f"means {len(found)} upstream models: {told}", "use a longer code")
        return found[0] if found else None

    def offers(self) -> list[Offer]:
        return [upstream.offer(self._node, one.model, one.free_slots) for one in self._served.values()]

    def local_models(self) -> list[LocalModel]:
        return [LocalModel(one.offer, one.provider) for one in self._served.values()]


def _means(text: str, one: Upstream) -> bool:
    try:
        ref = refs.parse_ref(text)
    except Malformed:
        return False
    match ref:
        case refs.CodeRef(code=code, name=name):
            return one.code.startswith(code) or name == one.offer.name
        case refs.CidRef(cid=cid):
            return cid == one.offer.cid
        case refs.NameRef(name=name):
            return name == one.offer.name
    return False


def _unlisted(model: str, listed: list[str]) -> NotFound:
    named = ", ".join(ascii(name[:80])[1:-1] for name in listed[:_LISTED]) or "none"
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return NotFound(ascii(model[:80])[1:-1], f"the upstream does not list it, but {named}{more}", "choose one of its models with --model")
