"""One LoRA step on one GPU, ours and the peers interleaved: `python benchmarks/gpu_step.py --help`.

The works are data in `benchmarks/gpu/works.py`; how they are run stands in `benchmarks/gpu/step.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # The repository's root, not this folder, is where the benchmarks are a package.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from benchmarks.gpu.step import main

    sys.exit(main())
