"""OpenAI's own client in several major versions, each in an environment of its own, against one server with keys."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.report import REPOSITORY
from tenon.serve.front.access import Access
from tenon.tenants.keys import KeyStore, Limits
from tenon.tenants.usage import UsageBook
from tests.serve.damages import DAMAGES
from tests.serve.house import House, Running, serving, wait_until

SCRIPT = Path(__file__).parent / "clients" / "talk_openai.py"
# Major version -> the interpreter that has it; benchmarks/prepare_clients.sh makes them. The last is the suite's own.
CLIENTS = {
    "1": REPOSITORY / ".venvs" / "openai1" / "bin" / "python",
    "2": REPOSITORY / ".venvs" / "openai2" / "bin" / "python",
    "own": Path(sys.executable),
}


@pytest.fixture(scope="module")
def keyed(house: House, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, list[str], UsageBook]]:
    folder = tmp_path_factory.mktemp("clients")
    DAMAGES["truncated"](house.registry.folder(house.register("broken", rank=2, seed=90)))
    store, book = KeyStore(folder / "keys.json"), UsageBook(folder / "usage.db")
    keys = [store.create("all")[0], store.create("narrow", rights=("low",))[0]]
    keys.append(store.create("poor", limits=Limits(tokens_per_month=1))[0])
    with serving(house, access=Access(store, book)) as running:
        yield running, keys, book


@pytest.mark.parametrize("major", CLIENTS)
def test_openai_client(keyed: tuple[Running, list[str], UsageBook], major: str) -> None:
    python, (running, keys, _) = CLIENTS[major], keyed
    if not python.is_file():
        pytest.skip(f"{python} is not there: sh benchmarks/prepare_clients.sh")
    done = subprocess.run(
        [str(python), str(SCRIPT), running.url, *keys], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert major in ("own", said["version"].partition(".")[0]) and len(said["done"]) >= 8
    wait_until(lambda: running.server.gate.open == 0 and running.server.engine.load.running == 0)
