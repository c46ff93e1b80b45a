"""Fixed bases, machines and data sizes, and plans made of them."""

from __future__ import annotations

from pathlib import Path

from tenon.bases.facts import ModelFacts
from tenon.plan.decide import decide
from tenon.plan.size import DataSize
from tenon.plan.values import BasePlan, Choice, MachineFacts, Plan
from tenon.recipe.load import Loaded, parse_recipe

SMALL = "base: b\ndata: {train: rows.jsonl}\n"
GB = 10**9

SMOLLM2_135M = ModelFacts(
    family="llama",
    layers=30,
    hidden=576,
    heads=9,
    kv_heads=3,
    head_dim=64,
    feed_forward=1536,
    vocab=49_152,
    context_tokens=8192,
    norm_eps=1e-5,
    rope={"theta": 100_000.0},  # pyright: ignore[reportArgumentType]
    tied_head=True,
    rotary_layers=(True,) * 30,
    window_layers=(0,) * 30,
)
LLAMA_8B = ModelFacts(
    family="llama",
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    feed_forward=14_336,
    vocab=128_256,
    context_tokens=131_072,
    norm_eps=1e-5,
    rope={"theta": 500_000.0},  # pyright: ignore[reportArgumentType]
    tied_head=False,
    rotary_layers=(True,) * 32,
    window_layers=(0,) * 32,
)
LLAMA_1B = LLAMA_8B.model_copy(
    update={
        "layers": 16,
        "hidden": 2048,
        "head_dim": 64,
        "feed_forward": 8192,
        "tied_head": True,
        "rotary_layers": (True,) * 16,
        "window_layers": (0,) * 16,
    }
)

CPU = MachineFacts(
    device="cpu",
    device_name="two cores",
    device_count=1,
    device_memory_bytes=16 * GB,
    host_memory_bytes=16 * GB,
    cores=2,
    threads=2,
    bf16=False,
    free_disk_bytes=100 * GB,
)
H100 = MachineFacts(
    device="cuda",
    device_name="NVIDIA H100 80GB HBM3",
    device_count=1,
    device_memory_bytes=80 * GB,
    host_memory_bytes=200 * GB,
    cores=16,
    threads=16,
    bf16=True,
    free_disk_bytes=500 * GB,
    capability=(9, 0),
)
A100 = H100.model_copy(update={"device_name": "NVIDIA A100-SXM4-40GB", "capability": (8, 0)})
T4 = H100.model_copy(
    update={"device_name": "Tesla T4", "device_memory_bytes": 15 * GB, "bf16": False, "capability": (7, 5)}
)
SIZE = DataSize(rows=1000, mean_tokens=60.0, longest_tokens=120, exact=True)


def load(text: str = SMALL, *overrides: str, file: str = "my.yaml") -> Loaded:
    return parse_recipe(text, overrides, file=Path("/recipes") / file, working_folder=Path("/work"))


def base_of(facts: ModelFacts = SMOLLM2_135M) -> BasePlan:
    return BasePlan(spec="b", path="/bases/b", base_hash="0" * 64, facts=facts)


def plan_of(
    *overrides: str,
    text: str = SMALL,
    facts: ModelFacts = SMOLLM2_135M,
    machine: MachineFacts = CPU,
    size: DataSize = SIZE,
    file: str = "my.yaml",
) -> Plan:
    return decide(load(text, *overrides, file=file), base=base_of(facts), machine=machine, data_size=size)


def choice(plan: Plan, key: str) -> Choice:
    return next(one for one in plan.choices if one.key == key)
