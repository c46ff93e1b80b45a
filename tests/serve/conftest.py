"""One house for the module's tests, and one server over it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai import OpenAI

from tests.serve.house import House, Running, make_house, serving


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return make_house(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def running(house: House) -> Iterator[Running]:
    with serving(house) as started:
        yield started


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=running.url, api_key="none", max_retries=0, timeout=30) as opened:
        yield opened
