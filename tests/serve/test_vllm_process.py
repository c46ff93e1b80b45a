"""The process of vLLM: its command, what is said when it does not start, and that it outlives nobody."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tenon.errors import RunError
from tenon.serve.vllm.process import RANKS, TESTED, VllmProcess, rank_for
from tests.serve.house import House, wait_until
from tests.serve.vllm_house import make_launch, never

HOLDER = """
import sys
from pathlib import Path
from tenon.serve.vllm.process import Launch, VllmProcess
python, base, log, site = sys.argv[1:]
process = VllmProcess.start(Launch(Path(python), Path(base), Path(log), {"PYTHONPATH": site}))
process.wait_until_ready(lambda seconds: None)
print(process.pid, flush=True)
sys.stdin.read()
"""


def start_error(house: House, folder: Path, fails: str) -> RunError:
    process = VllmProcess.start(make_launch(house, folder, FAKE_VLLM_FAILS=fails))
    with pytest.raises(RunError) as caught:
        process.wait_until_ready(lambda seconds: None)
    process.end()
    assert caught.value.code == "run-engine-start" and "exit status 1" in caught.value.what
    return caught.value


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("ValueError: the KV cache needed is larger than what there is", "--cache"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", "lower --cache"),
        ("api_server.py: error: unrecognized arguments: --max-loras", "docs/vllm.md"),
        ("ModuleNotFoundError: No module named 'vllm'", "pip install vllm"),
        ("RuntimeError: something else", "look at the end"),
    ],
)
def test_a_start_that_fails_is_told_with_its_reason_and_what_to_do(
    house: House, tmp_path: Path, said: str, remedy: str
) -> None:
    error = start_error(house, tmp_path, f"INFO all is well\n{said}")
    assert said in error.got and "all is well" not in error.got
    assert remedy in error.hint and str(tmp_path / "vllm.log") in error.hint


def test_a_python_that_is_none_is_named(house: House, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nowhere/python cannot be run: No such file") as caught:
        VllmProcess.start(replace(make_launch(house, tmp_path), python=Path("nowhere/python")))
    assert "--engine-python" in caught.value.hint


def test_a_start_that_takes_too_long_is_given_up(house: House, tmp_path: Path) -> None:
    process = VllmProcess.start(make_launch(house, tmp_path))
    try:
        with pytest.raises(RunError, match="was not ready after"):
            process.wait_until_ready(lambda seconds: None, patience_seconds=0)
    finally:
        process.end()


def test_a_wait_can_be_broken_off(house: House, tmp_path: Path) -> None:
    process = VllmProcess.start(make_launch(house, tmp_path))
    try:
        with pytest.raises(Exception, match="run-stopped"):
            process.wait_until_ready(lambda seconds: never())
    finally:
        process.end()
    assert not psutil.pid_exists(process.pid)


def test_the_key_is_not_on_the_command_line_and_nobody_enters_without_it(house: House, tmp_path: Path) -> None:
    import httpx

    process = VllmProcess.start(make_launch(house, tmp_path))
    try:
        process.wait_until_ready(lambda seconds: None)
        key = process.headers["Authorization"].removeprefix("Bearer ")
        assert len(key) > 30 and key not in " ".join(psutil.Process(process.pid).cmdline())
        body = {"model": "base", "prompt": [1]}
        assert httpx.post(f"{process.url}/v1/completions", json=body).status_code == 401
        assert process.url.startswith("http://127.0.0.1:")
    finally:
        process.end()


def test_it_ends_with_whoever_started_it_however_that_one_ends(house: House, tmp_path: Path) -> None:
    launch = make_launch(house, tmp_path)
    words = [sys.executable, "-c", HOLDER, sys.executable, str(launch.base), str(launch.log)]
    holder = subprocess.Popen(
        [*words, launch.environment["PYTHONPATH"]],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    pid = int(holder.stdout.readline())
    assert psutil.pid_exists(pid)
    holder.kill()
    holder.communicate()
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie")


def test_a_server_that_makes_no_answers_did_not_start(house: House, tmp_path: Path) -> None:
    process = VllmProcess.start(make_launch(house, tmp_path, FAKE_VLLM_DUMB="1"))
    try:
        process.wait_until_ready(lambda seconds: None)
        with pytest.raises(RunError, match=r"vLLM makes no answers: .*not today"):
            process.warm_up()
        process.end()
        with pytest.raises(RunError, match="run-engine-start"):
            process.warm_up()
    finally:
        process.end()


def test_the_versions_that_were_tested_are_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "vllm.md").read_text()
    assert [version for version in TESTED if f"` {version} |" not in page] == []


def test_ranks_are_rounded_up_to_what_vllm_knows() -> None:
    assert [rank_for(rank) for rank in (1, 2, 8, 33, 64, 65, 512, 513)] == [1, 8, 8, 64, 64, 128, 512, None]
    assert list(RANKS) == sorted(RANKS)
