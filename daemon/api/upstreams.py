"""Models of other servers in the routes of the local ones: served and stopped by the same, never fetched or removed."""

from __future__ import annotations

from typing import Any

from daemon.api import views
from daemon.api.body import HINT, Fields
from daemon.api.services import Services, Upstream
from daemon.errors import UsageError

_OTHERS = "a model of another server is served by `upstream` and `slots` alone"


async def serve(known: Services, given: Any, fields: Fields) -> dict[str, Any]:
    """Serve `{url, model, key?}`; of the other `fields` only `slots` means something. The key is in no answer and no error."""
    wanted = fields.within("upstream", given)
    url, model, key = wanted.required_text("url"), wanted.required_text("model"), wanted.text("key")
    wanted.done()
    slots = fields.integer("slots", 1, 256)
    try:
        fields.done()
    except UsageError as error:
        raise UsageError(error.what, _OTHERS, HINT) from error
    return views.upstream(known, await known.upstreams.serve(url, model, key, slots))


async def stop(known: Services, served: Upstream) -> dict[str, Any]:
    view = views.upstream(known, served)
    await known.upstreams.stop(served)
    return {**view, "serving": False, "local": False}


def refuse(known: Services, wanted: str) -> None:
    """Raises `UsageError` when `wanted` means a model of another server."""
    if known.upstreams.find(wanted) is not None:
        raise UsageError(wanted, "another server answers for it, there is no file of it", "swarmctl stop ends that")
