"""Fixtures of the tests that talk to the toy server."""

from collections.abc import Iterator

import httpx
import pytest
from openai import OpenAI


@pytest.fixture
def sdk(http: httpx.Client) -> Iterator[OpenAI]:
    """OpenAI's client of the session's server; without its silent retries."""
    with OpenAI(base_url=str(http.base_url.join("/v1")), api_key="none", max_retries=0, timeout=120) as client:
        yield client
