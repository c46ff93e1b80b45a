"""Which engine a sequence goes to: the one that its adapter, or its beginning, is at home on, unless that is too busy.

Homes are found by rendezvous hashing (Thaler, Ravishankar 1998): every key ranks all engines by a hash of both, so when
one goes, only its own keys move, each to its next. No engine gets more than `bound` times the mean of what all have
(consistent hashing with bounded loads: Mirrokni, Thorup, Zadimoghaddam 2018). Pure: this module knows no engines.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

from tenon.serve.jobs import Job

# A higher bound keeps adapters together, a lower one spreads the work; 1.25 costs a quarter of an engine at the worst.
BOUND = 1.25
# Tokens that prompts for the bare base have to begin with alike to be at home together: about one block of the cache.
_BEGINNING_TOKENS = 32


def home_key(job: Job) -> str:
    """What decides where a job is at home: its adapter; for the bare base its tenant and how its prompt begins."""
    if job.adapter is not None:
        return job.adapter.key
    beginning = ",".join(map(str, job.request.prompt_ids[:_BEGINNING_TOKENS]))
    return f"base {job.request.salt} {beginning}"


def choose(key: str, loads: Mapping[int, int], *, bound: float = BOUND) -> int:
    """The engine for one more sequence. loads: sequences that each engine has, by its number; at least one engine.

    After it, no engine that was chosen has more than ceil(bound x mean), the mean taken with this sequence.
    """
    most = math.ceil(bound * (sum(loads.values()) + 1) / len(loads))
    return next(engine for engine in ranking(key, loads) if loads[engine] < most)


def ranking(key: str, engines: Mapping[int, int]) -> list[int]:
    """Engines in the order in which a key prefers them."""
    return sorted(engines, key=lambda engine: _weight(key, engine), reverse=True)


def _weight(key: str, engine: int) -> bytes:
    return hashlib.blake2b(f"{engine} {key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
