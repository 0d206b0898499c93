"""The stand-in API that the tests of routes share; a module that needs another `world` or `api` has its own."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import pytest

from tests.functional.api_server import TOKEN, World, running


@pytest.fixture
async def world() -> World:
    return World()


@pytest.fixture
async def api(world: World) -> AsyncIterator[aiohttp.ClientSession]:
    async with running(world) as url, aiohttp.ClientSession(url, headers={"Authorization": f"Bearer {TOKEN}"}) as session:
        yield session
