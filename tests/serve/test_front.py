"""What stands in front of the engines: HTTP, names, keys and text work in a process without torch."""

from __future__ import annotations

import subprocess
import sys

_FRONT = ("tenon.serve.run", "tenon.serve.pool.pool", "tenon.pipeline.serving", "tenon.pipeline.replicas")


def test_the_front_never_imports_torch() -> None:
    """Even indirectly: it starts in a second, and needs no GPU's memory."""
    wanted = "; ".join(f"import {name}" for name in _FRONT)
    code = f"import sys; {wanted}; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
