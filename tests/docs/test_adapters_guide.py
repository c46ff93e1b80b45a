"""docs/adapters.md, "From training to prod": its commands are typed word by word, against a real server."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tenon.registry.store import Registry
from tests.conftest import REPOSITORY
from tests.journeys.world import RECIPE, World, make_world

SHORT = RECIPE.replace("register: echo", "register: bot").replace("epochs: 4", "steps: 3")


def commands() -> list[str]:
    """The lines of the guide's blocks, in order."""
    text = (REPOSITORY / "docs" / "adapters.md").read_text(encoding="utf-8")
    guide = text.split("## From training to prod", 1)[1].split("\n## ", 1)[0]
    blocks = re.findall(r"^```sh\n(.*?)^```", guide, flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def typed(world: World, line: str, *, patience_seconds: float = 0.0) -> str:
    """What a shell prints for a line; a line that waits for something is typed again until it works."""
    deadline = time.monotonic() + patience_seconds
    while True:
        shell = f'set -o pipefail; tenon() {{ {sys.executable} -m tenon.cli.main "$@"; }}; {line}'
        done = subprocess.run(
            ["bash", "-c", shell], cwd=world.root, env=world.environment, capture_output=True, text=True, timeout=300
        )
        if done.returncode == 0:
            return done.stdout
        assert time.monotonic() < deadline, f"{line}\n{done.stdout}\n{done.stderr}"
        time.sleep(0.5)


@pytest.mark.slow
def test_the_guide_can_be_followed_word_by_word(tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("the guide's clients are curl, which is not on this machine")
    world, port = make_world(tmp_path / "world", recipe=SHORT), free_port()
    (world.root / "bot.yaml").write_text(SHORT)
    registry = Registry(world.settings.registry)
    serving: subprocess.Popen[bytes] | None = None
    lines = [line.replace("127.0.0.1:8000", f"127.0.0.1:{port}") for line in commands()]
    assert len(lines) == 16
    said: dict[str, str] = {}
    try:
        for line in lines:
            if line.startswith("tenon serve"):
                words = [sys.executable, "-m", "tenon.cli.main", *line.split()[1:], "--port", str(port)]
                serving = subprocess.Popen(words, cwd=world.root, env=world.environment)
                typed(world, f"curl -sf http://127.0.0.1:{port}/ready", patience_seconds=120)
                continue
            said[line] = typed(world, line, patience_seconds=20 if "/metrics" in line else 0)
    finally:
        if serving is not None:
            serving.terminate()
            assert serving.wait(60) == 0
    answers = [text for line, text in said.items() if "chat/completions" in line]
    assert ['"model":"bot@1"' in text for text in answers] == [True, True]
    counted = next(text for line, text in said.items() if "/metrics" in line)
    assert 'tenon_shadow_requests_total{alias="bot@prod",outcome="answered",version="2"} 1.0' in counted
    assert "bot@prod: 1 50%, 2 50%" in said["tenon adapters rollback bot@prod"], "one step back"
    assert "asked for" in said["tenon adapters aliases"].replace("\n", " ")
    assert registry.versions("bot") == (2,) and registry.get("bot@prod").version == 2
