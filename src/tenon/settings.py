"""The only reader of environment variables.

Everything that a machine's owner (not a recipe) decides: where caches and the registry live, whether the network may be
used, how many threads. This module does not know what the values are used for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment says.

    home: registry and everything meant to last (TENON_HOME, default ~/.tenon).
    cache: what can be made again: dequantised bases, tokenised data (TENON_CACHE, default HOME/cache).
    offline: never ask a hub (TENON_OFFLINE=1 or HF_HUB_OFFLINE=1).
    threads: CPU threads for arithmetic; 0 means all cores this process may use (TENON_THREADS).
    debug: show tracebacks (TENON_DEBUG=1).
    worker: module that runs as the worker process (TENON_WORKER); `tenon.worker.fake` does no arithmetic.
    visible_devices: GPUs that this process may use, as CUDA reads them (CUDA_VISIBLE_DEVICES); None is all of them.
    otlp_endpoint: where traces go, OTLP over HTTP (OTEL_EXPORTER_OTLP_ENDPOINT).
    rank, ranks, rendezvous: which of how many processes of one run this is, and the host:port where they meet; set by
    torchrun, which starts them (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; heeded with TORCHELASTIC_RUN_ID alone).
    """

    home: Path
    cache: Path
    offline: bool
    threads: int
    debug: bool
    worker: str = "tenon.worker"
    visible_devices: str | None = None
    otlp_endpoint: str = "http://127.0.0.1:4318"
    rank: int = 0
    ranks: int = 1
    rendezvous: str = ""

    @property
    def registry(self) -> Path:
        """The folder of registered adapters."""
        return self.home / "adapters"

    @property
    def keys(self) -> Path:
        """The file of API keys."""
        return self.home / "keys.json"

    @property
    def usage(self) -> Path:
        """What keys have used."""
        return self.home / "usage.db"


def read_settings(environ: dict[str, str] | None = None) -> Settings:
    """Read the environment once; pass the value on."""
    env = dict(os.environ) if environ is None else environ
    home = Path(env.get("TENON_HOME", "~/.tenon")).expanduser()
    started = "TORCHELASTIC_RUN_ID" in env
    return Settings(
        home=home,
        cache=Path(env["TENON_CACHE"]).expanduser() if env.get("TENON_CACHE") else home / "cache",
        offline=_truthy(env.get("TENON_OFFLINE")) or _truthy(env.get("HF_HUB_OFFLINE")),
        threads=int(env.get("TENON_THREADS") or 0),
        debug=_truthy(env.get("TENON_DEBUG")),
        worker=env.get("TENON_WORKER") or "tenon.worker",
        visible_devices=env.get("CUDA_VISIBLE_DEVICES"),
        otlp_endpoint=env.get("OTEL_EXPORTER_OTLP_ENDPOINT") or "http://127.0.0.1:4318",
        rank=int(env.get("RANK") or 0) if started else 0,
        ranks=int(env.get("WORLD_SIZE") or 1) if started else 1,
        rendezvous=f"{env.get('MASTER_ADDR')}:{env.get('MASTER_PORT')}" if started else "",
    )


def child_environment(settings: Settings) -> dict[str, str]:
    """The environment for a process that is to have these settings: this process's own, with them written in."""
    devices = {} if settings.visible_devices is None else {"CUDA_VISIBLE_DEVICES": settings.visible_devices}
    return {
        **_allocator(os.environ),
        # Threads that wait for each other by spinning are many times slower as soon as anything else wants a core.
        "OMP_WAIT_POLICY": "PASSIVE",
        **os.environ,
        "TENON_HOME": str(settings.home),
        "TENON_CACHE": str(settings.cache),
        "TENON_OFFLINE": "1" if settings.offline else "0",
        "TENON_THREADS": str(settings.threads),
        "TENON_DEBUG": "1" if settings.debug else "0",
        "TENON_WORKER": settings.worker,
        **devices,
    }


def foreign_environment() -> dict[str, str]:
    """The environment for a program of another Python environment: this process's own, without what would lead its
    Python to packages of ours.
    """
    ours = {"PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV"}
    return {name: value for name, value in os.environ.items() if name not in ours}


def _allocator(environ: Mapping[str, str]) -> dict[str, str]:
    """How torch is to take a GPU's memory: in segments that grow, so that little of it is lost between tensors of many
    sizes. Nothing where somebody has said it otherwise, by either of its names.
    """
    if {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(environ):
        return {}
    return {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


def _truthy(text: str | None) -> bool:
    return (text or "").strip().lower() in {"1", "true", "yes", "on"}
