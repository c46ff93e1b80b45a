"""What a figure was measured on: GPU, driver, versions; and which code was measured, as a hash of its files.

A GPU machine may have no repository, so the hash stands in for the commit until results are taken home. This module
imports nothing heavy: the versions are those of installed packages, not of imported ones.
"""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from benchmarks.report import REPOSITORY, describe_processor

PACKAGES = (
    *("torch", "triton", "transformers", "peft", "accelerate", "numpy", "safetensors"),
    *("unsloth", "unsloth-zoo", "liger-kernel", "bitsandbytes", "trl", "torchao"),
)
OUR_CODE = ("src/tenon/**/*.py", "benchmarks/ours/*.py", "benchmarks/gpu/rows.py")
PEER_CODE = ("benchmarks/peers/lora_*.py",)
_QUERY = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")


@dataclass(frozen=True, slots=True)
class Machine:
    """A device, its driver ("" where there is none), and the versions that ran on it."""

    device: str
    driver: str
    versions: dict[str, str]

    @property
    def title(self) -> str:
        """Device and driver in words."""
        return f"{self.device}, driver {self.driver}" if self.driver else self.device

    @property
    def key(self) -> str:
        """A short name that equal machines share."""
        text = repr((self.device, self.driver, sorted(self.versions.items())))
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def read_machine(device: str, peer_path: str = "") -> Machine:
    """This machine. device: cuda or cpu. peer_path: where the peers' packages lie, which win for peers."""
    versions = {"python": platform.python_version(), **installed((peer_path,) if peer_path else ())}
    if device == "cpu":
        return Machine(describe_processor(), "", versions)
    done = subprocess.run(_QUERY, capture_output=True, text=True, check=True)
    name, _, driver = done.stdout.splitlines()[0].partition(", ")
    return Machine(name.strip(), driver.strip(), versions)


def installed(folders: Iterable[str]) -> dict[str, str]:
    """Versions of the packages that matter, from these folders and from this environment."""
    found: dict[str, str] = {}
    for source in ([*folders], None):
        listed = distributions() if source is None else distributions(path=source)
        for one in listed:
            name = (one.metadata["Name"] or "").lower().replace("_", "-")
            if name in PACKAGES:
                found.setdefault(name, one.version)
    return dict(sorted(found.items()))


def code_hash(patterns: Iterable[str], root: Path = REPOSITORY) -> str:
    """A short hash of the files that match, their names and bytes. Raises ValueError when none does."""
    files = sorted(path for pattern in patterns for path in root.glob(pattern))
    if not files:
        raise ValueError(f"no file of {root} matches")
    digest = hashlib.sha256()
    for path in files:
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
