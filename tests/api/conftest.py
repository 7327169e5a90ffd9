"""A scripted engine, the server in front of it, and the clients that talk to it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from peft_dist.api.options import ServerOptions
from tests.api.http_support import ScriptedClient, serving


@pytest.fixture
def engine() -> ScriptedClient:
    return ScriptedClient()


@pytest.fixture
def url(engine: ScriptedClient) -> Iterator[str]:
    with serving(engine) as address:
        yield address


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=100) as client:
        yield client


@pytest.fixture
def api(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=100) as client:
        yield client


@pytest.fixture(scope="module")
def shared_engine() -> ScriptedClient:
    """One engine for a module's tests that change nothing about it."""
    return ScriptedClient()


@pytest.fixture(scope="module")
def shared(shared_engine: ScriptedClient) -> Iterator[httpx.Client]:
    """Talks to the server of ``shared_engine``, which takes bodies of up to 20,000 bytes."""
    options = ServerOptions(max_body_bytes=20_000)
    with serving(shared_engine, options) as address, httpx.Client(base_url=address, timeout=100) as client:
        yield client
