"""vLLM as a process of its own, in an environment of its own: its command, its start, its end, and what its log says.

It listens on loopback with a key that nobody else has, in a process group of its own, and ends with this process. This
module knows no jobs and no adapters, and does not start anything twice.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import httpx

from tenon.errors import RunError

# What the base is called inside; adapters are called by their digests, so nothing clashes.
BASE_NAME = "base"
# Versions whose answers and routes were compared with ours: docs/vllm.md.
TESTED = ("0.32.0",)
# vLLM reserves memory for adapters of one of these ranks.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
Dtype = Literal["float32", "bfloat16", "float16"]

_CHILD = Path(__file__).with_name("child.py")
_LOOPBACK = "127.0.0.1"
_POLL_SECONDS = 0.25
_LOG_TAIL_BYTES = 16_000
_TOLD_LINES = 3
_KILL_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Launch:
    """What a vLLM server is started with.

    python: of its environment. base: a folder in Hugging Face's layout. rows: sequences at a time. slots: adapters in
    one batch. max_rank: one of RANKS. cache_bytes: of keys and values. pass_tokens: most tokens of one pass.
    top_logprobs: most of the likeliest tokens that may be asked for. drain_seconds: after SIGTERM what runs may take
    so long. threads: for arithmetic on a CPU. environment: what it inherits. log: gets all that it prints, appended.
    extra: further words of vLLM's command line.
    """

    python: Path
    base: Path
    log: Path
    environment: Mapping[str, str]
    dtype: Dtype = "float32"
    context_tokens: int = 4096
    rows: int = 16
    slots: int = 8
    max_rank: int = 64
    cache_bytes: int = 2 << 30
    pass_tokens: int = 2048
    top_logprobs: int = 20
    drain_seconds: float = 30.0
    threads: int = 1
    extra: tuple[str, ...] = field(default=())

    def variables(self, key: str) -> dict[str, str]:
        """Its environment. What somebody has set for vLLM stays, but for what this server stands on."""
        return {
            # On a CPU it would keep a core for itself, of however few.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(self.threads),
            # It asks nobody outside, and tells nobody.
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            **self.environment,
            "VLLM_API_KEY": key,
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        }

    def command(self, port: int) -> list[str]:
        """The command line, without the key: anybody on the machine can read command lines."""
        options: dict[str, object] = {
            "--model": self.base,
            "--served-model-name": BASE_NAME,
            "--host": _LOOPBACK,
            "--port": port,
            "--dtype": self.dtype,
            "--max-model-len": self.context_tokens,
            "--max-num-seqs": self.rows,
            "--max-num-batched-tokens": max(self.pass_tokens, self.rows),
            "--kv-cache-memory-bytes": self.cache_bytes,
            "--max-loras": self.slots,
            "--max-lora-rank": self.max_rank,
            "--max-logprobs": self.top_logprobs,
            # Not the base's own: who asks has said it all.
            "--generation-config": "vllm",
            "--shutdown-timeout": round(self.drain_seconds),
        }
        words = [word for name, value in options.items() for word in (name, str(value))]
        flags = ["--enable-lora", "--enable-prefix-caching", "--disable-uvicorn-access-log"]
        return [str(self.python), str(_CHILD), *words, *flags, *self.extra]


class VllmProcess:
    """One vLLM server, from `start` to `end`."""

    def __init__(self, process: subprocess.Popen[bytes], launch: Launch, *, port: int, key: str) -> None:
        self._process, self._launch = process, launch
        self.url = f"http://{_LOOPBACK}:{port}"
        self.headers = {"Authorization": f"Bearer {key}"}

    @classmethod
    def start(cls, launch: Launch) -> VllmProcess:
        """Start it; it answers once `wait_until_ready` has returned. Raises RunError run-engine-start."""
        port, key = _free_port(), secrets.token_urlsafe(32)
        launch.log.parent.mkdir(parents=True, exist_ok=True)
        with launch.log.open("ab") as log:
            try:
                process = subprocess.Popen(
                    launch.command(port),
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env=launch.variables(key),
                    process_group=0,
                )
            except OSError as error:
                raise RunError(
                    "run-engine-start",
                    f"{launch.python} cannot be run: {error.strerror}",
                    hint="give the Python of an environment that has vLLM: --engine-python PATH",
                ) from error
        return cls(process, launch, port=port, key=key)

    @property
    def pid(self) -> int:
        """Its process id, which is also its process group."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Its exit status, negative for the signal that killed it; None while it runs."""
        return self._process.poll()

    def wait_until_ready(self, on_wait: Callable[[float], None], *, patience_seconds: float = 1800.0) -> None:
        """Wait until it takes requests. on_wait: called a few times a second with the seconds so far; may raise.

        Raises RunError run-engine-start when it ends instead, or takes longer than patience_seconds.
        """
        began = time.monotonic()
        with httpx.Client(base_url=self.url, headers=self.headers, timeout=5.0, trust_env=False) as client:
            while not _answers(client):
                seconds = time.monotonic() - began
                if self.status is not None or seconds > patience_seconds:
                    raise self.start_error(f"was not ready after {seconds:.0f} s")
                on_wait(seconds)
                time.sleep(_POLL_SECONDS)

    def warm_up(self) -> None:
        """Have a token made and scored: what vLLM compiles for it, nobody else waits for.

        Raises RunError run-engine-start.
        """
        body = {"model": BASE_NAME, "prompt": [0, 0], "max_tokens": 2, "temperature": 0, "echo": True, "logprobs": 1}
        try:
            answer = httpx.post(
                f"{self.url}/v1/completions", json=body, headers=self.headers, timeout=None, trust_env=False
            )
        except httpx.TransportError as error:
            raise self.start_error("went away before its first answer") from error
        if answer.status_code != 200:
            raise self.start_error(f"makes no answers: {answer.text[:200]}")

    def start_error(self, otherwise: str) -> RunError:
        """Why it did not start, as far as its log tells. otherwise: what to say of one that still runs."""
        how = otherwise if self.status is None else f"ended at its start ({exit_text(self.status)})"
        text = _log_tail(self._launch.log)
        return RunError(
            "run-engine-start",
            f"vLLM {how}",
            got=" | ".join(_telling_lines(text)),
            hint=f"{_remedy(text)}; its whole report is in {self._launch.log}",
        )

    def forget_log(self) -> None:
        """All went well: nobody will read what it printed."""
        self._launch.log.unlink(missing_ok=True)

    def end(self, *, patience_seconds: float = _KILL_SECONDS) -> None:
        """End it with everything that it started; what runs is given patience_seconds to finish."""
        if self.status is None:
            with suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(patience_seconds)
        # Its own processes too, also where it died before them.
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()


def exit_text(status: int) -> str:
    """An exit status in words."""
    return f"signal {-status}" if status < 0 else f"exit status {status}"


def rank_for(rank: int) -> int | None:
    """The smallest of RANKS that holds adapters of this rank; None when there is none."""
    return next((offered for offered in RANKS if offered >= rank), None)


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def _free_port() -> int:
    with socket.create_server((_LOOPBACK, 0)) as listening:
        return int(listening.getsockname()[1])


def _log_tail(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_TAIL_BYTES))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def _telling_lines(text: str) -> list[str]:
    """The last lines that name an error, else the last lines; vLLM tells the cause first and its consequences after."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line or line.startswith("error:") or ": error:" in line]
    return [line[-300:] for line in (errors or lines)[-_TOLD_LINES:]]


def _remedy(text: str) -> str:
    """What to do about the commonest causes."""
    if "No module named 'vllm'" in text:
        return "install vLLM there: that PYTHON -m pip install vllm"
    if "KV cache" in text and ("larger than" in text or "needed" in text):
        return "give more with --cache, or shorter sequences with --context"
    if "out of memory" in text or "less than desired" in text:
        return "free memory of the device, or lower --cache and --rows"
    if "unrecognized arguments" in text or "invalid choice" in text:
        return "this version of vLLM has other options: install one that docs/vllm.md lists"
    return "look at the end of its report"
