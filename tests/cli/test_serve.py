"""`tenon serve` with the fake worker: what it prints, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tenon.settings import Settings, child_environment

from .conftest import Command


def test_it_prints_the_address_and_a_command_to_try(workplace: Path, fake_settings: Settings) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tenon.cli.main", "serve", "--host", "0.0.0.0", "--port", "8123"],
        cwd=workplace, env=child_environment(fake_settings), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    first, second = process.stdout.readline(), process.stdout.readline()
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert first == "smollm2-135m at http://0.0.0.0:8123: 16 sequences of 4,096 tokens, 8 adapters at a time\n"
    assert second.startswith("curl http://0.0.0.0:8123/v1/chat/completions") and '"model": "smollm2-135m"' in second
    assert "no key is asked for" in err and "stopping" in err


def test_what_cannot_be_served_is_said(tenon: Command) -> None:
    assert "error[base-missing]" in tenon("serve", "nothing-like-it").err
    assert "error[recipe-missing]" in tenon("serve", "nothing.yaml").err
    done = tenon("serve", "--cache", "much")
    assert done.status == 2 and "--cache" in done.err
    done = tenon("serve", "--context", "100000")
    assert "error[plan-context]" in done.err and "type --context 8192, or less" in done.err
