"""A small world for whole journeys: a tiny random base with a chat template, rows, a recipe, and the real commands."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tenon.service.plans import make_plan
from tenon.service.training import create_run
from tenon.settings import Settings
from tests.tiny_bases import save_base

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RECIPE = """\
base: base
name: echo
data:
  train: rows.jsonl
  heldout: 0.1
lora:
  rank: 4
  dropout: 0.1
batch:
  rows: 8
limits:
  epochs: 4
validation:
  every: 10
checkpoint:
  every: 3
register: echo
"""


@dataclass(frozen=True, slots=True)
class World:
    """root holds base/, rows.jsonl, recipe.yaml, and home/ for the registry and caches."""

    root: Path

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the commands: nothing outside the world, one thread, no network."""
        own = {"TENON_HOME": str(self.root / "home"), "TENON_OFFLINE": "1", "TENON_THREADS": "1"}
        return {**os.environ, **own, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}

    def tenon(self, *words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run the real command to its end, in the world's folder."""
        return subprocess.run(
            [sys.executable, "-m", "tenon.cli.main", *words],
            cwd=self.root,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def start_worker(self, run: Path) -> subprocess.Popen[bytes]:
        """The process that trains a run, alone in a process group of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "tenon.worker", "train", str(run)],
            cwd=self.root,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def settings(self) -> Settings:
        """The settings that the environment means."""
        home = self.root / "home"
        return Settings(home=home, cache=home / "cache", offline=True, threads=1, debug=False)

    def plan_run(self, run: Path, *overrides: str) -> Path:
        """A run folder with the recipe's plan, not yet worked on."""
        planned = make_plan([self.root / "recipe.yaml"], [*overrides, f"run={run}"], self.settings)
        return create_run(planned.plan, planned.recipe_texts).path


def make_world(root: Path, *, rows: int = 120, recipe: str = RECIPE) -> World:
    """Build everything under root."""
    root.mkdir(parents=True, exist_ok=True)
    base = root / "base"
    save_base("llama", base)
    config = {"chat_template": TEMPLATE, "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    write_rows(root / "rows.jsonl", rows)
    (root / "recipe.yaml").write_text(recipe)
    return World(root)


def write_rows(path: Path, count: int, *, seed: int = 0) -> None:
    """Distinct chats: the answer repeats the question's words."""
    draw = random.Random(seed)
    words = ("the", "house", "lake", "then", "there", "when", "were", "home", "leather", "weather", "together")
    lines = []
    for number in range(count):
        said = " ".join(draw.choice(words) for _ in range(draw.randint(2, 9))) + f" {number}"
        messages = [{"role": "user", "content": said}, {"role": "assistant", "content": said.upper()}]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n")
