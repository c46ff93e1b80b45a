"""The first lines of a vLLM process: it ends with whoever started it, however that one ends. Then vLLM's own command.

Run as a file by the Python of vLLM's environment, which has no package of ours: this module imports nothing else.
Usage: python child.py OPTIONS of vLLM's server; standard input is a pipe that the parent holds open.
"""

import os
import runpy
import signal
import sys
import threading
from pathlib import Path


def _end_with_parent() -> None:
    """Wait until the pipe is closed, which a killed parent's is too; then end everything that vLLM has started."""
    os.read(0, 1)  # not through sys.stdin: whose lock would then be missed at the end
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Watch the parent from a thread, and be vLLM."""
    # Python looks in a script's own folder first; nothing there is for vLLM.
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != Path(__file__).resolve().parent]
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    # Not the `vllm` command: that one asks for a package called vllm, and the builds for CPUs have another name.
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")


# vLLM's own processes import this module again, under another name.
if __name__ == "__main__":
    main()
