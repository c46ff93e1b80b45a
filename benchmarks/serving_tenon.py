"""`tenon serve` as users start it, for benchmarks of serving: a server on a free port, and what its /metrics say."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx

from tenon.settings import Settings, child_environment


@contextmanager
def tenon_server(base: str, settings: Settings, *, cores: int, options: Sequence[str] = ()) -> Iterator[str]:
    """A server until the end of the block; OpenAI's base_url. options: further words of the command."""
    words = [str(Path(sys.executable).with_name("tenon")), "serve", base, "--port", "0", "--json", *options]
    environment = child_environment(replace(settings, threads=cores))
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=environment) as process:
        try:
            assert process.stdout is not None
            yield f"{json.loads(process.stdout.readline())['url']}/v1"
        finally:
            process.terminate()


def read_metrics(url: str) -> dict[str, float]:
    """The series of a server, by name and labels as Prometheus writes them. url: OpenAI's base_url."""
    text = httpx.get(f"{url.removesuffix('/v1')}/metrics", trust_env=False).raise_for_status().text
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}
