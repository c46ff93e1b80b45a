"""Serving by vLLM: its process over the same prepared base, the same adapters, behind the same HTTP.

This module does not know how jobs become requests (serve.vllm_engines).
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import psutil

from tenon.data.grammars import Grammars
from tenon.data.render import Renderer
from tenon.data.template import read_template
from tenon.data.tokenizer import load_tokenizer
from tenon.errors import PlanError
from tenon.pipeline.base import find_base
from tenon.pipeline.slot_data import Emit
from tenon.plan.requests import ForeignEngine, ServeRequest
from tenon.plan.values import BaseFormat
from tenon.processes import worker_log
from tenon.registry.store import Registry
from tenon.serve.api.protocol import MOST_TOP_LOGPROBS
from tenon.serve.engine.adapter_files import AdapterReader
from tenon.serve.jobs import Deliver, Limits
from tenon.serve.run import MakeEngines
from tenon.serve.vllm.adapters import VllmAdapters
from tenon.serve.vllm.engines import VllmEngines
from tenon.serve.vllm.process import RANKS, TESTED, Dtype, Launch, VllmProcess, rank_for
from tenon.settings import Settings, foreign_environment

# Room for adapters of the ranks that are common, also where none is registered yet.
_LEAST_RANK = 64
# With adapters vLLM compiles nothing of the model on a CPU, only odds and ends, at its first answer and with a C++
# compiler: longer than it allows a pass to take.
_ON_CPU = {"TORCH_COMPILE_DISABLE": "1"}
# Scores of a prompt end a vLLM on a CPU that has adapters, as soon as another sequence shares the pass (0.32).
_NOT_ON_CPU = ("prompt_logprobs",)
# On a CPU vLLM copies an adapter's matrices once for every token of a pass.
_PASS_TOKENS = {"cpu": 64, "cuda": 8192}
_NAMES: dict[str, Dtype] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_QUANTISED: dict[BaseFormat, tuple[str, ...]] = {"dense": (), "fp8": ("--quantization", "fp8")}


def foreign_engines(
    request: ServeRequest, engine: ForeignEngine, emit: Emit, settings: Settings
) -> tuple[Renderer, MakeEngines]:
    """How the base is asked, and vLLM, which answers by now.

    Raises PlanError plan-engine-base; RunError run-engine-start.
    """
    if engine.version not in TESTED:
        known = ", ".join(TESTED)
        text = f"vLLM {engine.version} is not one that Tenon was tested with ({known}): see docs/vllm.md"
        emit("warning", code="plan-engine-untested", text=text)
    on_cpu = request.engine.machine.device == "cpu"
    quantised, pass_tokens = _quantised(request), _PASS_TOKENS[request.engine.machine.device]
    limits = Limits(request.rows, request.context_tokens, request.cache_bytes, pass_tokens, request.slots)
    emit("phase", name="base", detail=request.engine.base.spec)
    folder = find_base(request.engine.base, settings)
    renderer = Renderer(load_tokenizer(folder), read_template(request.engine.template))
    launch = Launch(
        Path(engine.python),
        folder,
        worker_log("vllm", settings),
        {**(_ON_CPU if on_cpu else {}), **foreign_environment()},
        dtype=_NAMES[request.engine.precision],
        context_tokens=limits.context_tokens,
        rows=limits.rows,
        slots=limits.slots + on_cpu,
        max_rank=_room_for_ranks(request, settings),
        cache_bytes=limits.cache_bytes,
        pass_tokens=limits.pass_tokens,
        top_logprobs=MOST_TOP_LOGPROBS,
        drain_seconds=request.drain_seconds,
        threads=request.engine.machine.threads,
        extra=(*quantised, *engine.options),
    )

    def start(on_wait: Callable[[], None]) -> VllmProcess:
        return start_vllm(launch, on_wait)

    emit("phase", name="engine", detail=f"vLLM {engine.version}")
    process = start(lambda: None)
    adapters = VllmAdapters(
        _own_folder(settings.cache / "engines"),
        request.engine.facts,
        slots=limits.slots,
        max_rank=launch.max_rank,
        read=AdapterReader(Registry(settings.registry)),
        base_by_adapter=on_cpu,
    )

    def tell(text: str) -> None:
        emit("warning", code="run-engine-died", text=text)

    def make_engines(deliver: Deliver, _grammars: Grammars) -> VllmEngines:
        return VllmEngines(
            start,
            process,
            limits=limits,
            adapters=adapters,
            deliver=deliver,
            tell=tell,
            without=_NOT_ON_CPU if on_cpu else (),
        )

    return renderer, make_engines


def start_vllm(launch: Launch, on_wait: Callable[[], None]) -> VllmProcess:
    """A process that answers; nothing of it is left when the wait is broken off. Raises RunError run-engine-start."""
    process = VllmProcess.start(launch)
    try:
        process.wait_until_ready(lambda _seconds: on_wait())
        process.warm_up()
    except BaseException:
        process.end(patience_seconds=0.0)
        raise
    return process


def _quantised(request: ServeRequest) -> tuple[str, ...]:
    """How vLLM keeps the base as it was planned. Raises PlanError plan-engine-base."""
    kept = request.engine.frozen.format
    if request.engine.facts.stored == "nf4" or kept not in _QUANTISED:
        raise PlanError(
            "plan-engine-base",
            "vLLM is given a base as fp32, bf16, fp16 or fp8, and this one would be kept otherwise",
            got=kept if kept not in _QUANTISED else "nf4 files",
            hint="serve it with Tenon's own engine (without --engine vllm), or on a larger GPU",
        )
    return _QUANTISED[kept]


def _room_for_ranks(request: ServeRequest, settings: Settings) -> int:
    """The rank that vLLM reserves memory for: the highest that is registered for this base, or the common ones."""
    entries = Registry(settings.registry).list(on_damaged=lambda _error: None)
    ranks = [entry.rank for entry in entries if entry.base_hash == request.engine.base.base_hash]
    return max(rank_for(min(rank, RANKS[-1])) or RANKS[-1] for rank in (_LEAST_RANK, *ranks))


def _own_folder(parent: Path) -> Path:
    """A folder of this process, after removing those of processes of this machine that were killed."""
    host = f"vllm-{socket.gethostname()}-"
    parent.mkdir(parents=True, exist_ok=True)
    for folder in parent.glob(f"{host}*"):
        pid = folder.name.removeprefix(host)
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)
    return parent / f"{host}{os.getpid()}"
