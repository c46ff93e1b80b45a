"""What `test_ray` runs in Ray's environment: an application on a local Ray, asked through Ray's proxy."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from urllib.request import urlopen

import psutil
import ray  # pyright: ignore[reportMissingImports]
from openai import OpenAI
from ray import serve  # pyright: ignore[reportMissingImports]

from tenon.ray_app import Arguments, build

PORT = 8765
URL = f"http://127.0.0.1:{PORT}"


def wait_until(true: Callable[[], bool], *, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.2)


def replicas() -> list[int]:
    """Process ids of the replicas that live, by the title that Ray gives them."""
    titles = {process.pid: " ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])}
    return sorted(pid for pid, title in titles.items() if title.startswith("ray::ServeReplica"))


def main(base: str) -> None:
    """Start two replicas, ask them in each way, kill one, and ask again."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    arguments = Arguments(base=base, least=2, most=2, context=256, cache="20MB", rows=4, cpus=0.5)
    serve.run(build(arguments), name="tenon", route_prefix="/")
    client = OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=5, timeout=120)
    (model, *_) = [model.id for model in client.models.list()]
    with urlopen(f"{URL}/ready") as answer:
        assert answer.status == 200

    def ask() -> str:
        answer = client.completions.create(
            model=model, prompt=[5, 40, 90, 12], max_tokens=12, seed=3, extra_body={"ignore_eos": True}
        )
        assert answer.usage is not None and answer.usage.completion_tokens == 12
        return answer.choices[0].text

    first = ask()
    assert {ask() for _ in range(8)} == {first}, "whichever replica answers"
    chunks = client.completions.create(
        model=model, prompt=[5, 40, 90, 12], max_tokens=12, seed=3, stream=True, extra_body={"ignore_eos": True}
    )
    pieces = [chunk.choices[0].text for chunk in chunks if chunk.choices]
    assert "".join(pieces) == first and len(pieces) > 3, "it comes piece by piece"
    before = replicas()
    assert len(before) == 2, before
    os.kill(before[0], signal.SIGKILL)
    assert {ask() for _ in range(4)} == {first}, "the other one answers meanwhile"
    wait_until(lambda: len(set(replicas()) - {before[0]}) == 2)
    wait_until(lambda: {ask() for _ in range(6)} == {first})
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.write("all is well\n")
