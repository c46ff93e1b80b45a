"""Take home what a GPU machine measured: `python -m benchmarks.gpu.adopt FOLDER` (see gpu.sh).

gpu_step.json is merged, repetition by repetition; other results replace those that lie here. The machine had no
repository: where the code that it measured is this checkout's, the commit is written in.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console

from benchmarks.gpu.machine import OUR_CODE, PEER_CODE, code_hash
from benchmarks.gpu.records import UNKNOWN, read_records
from benchmarks.gpu.table import save, show
from benchmarks.report import RESULTS, current_commit

MERGED = "gpu_step"


def adopt(folder: Path, results: Path, commit: str, codes: tuple[str, ...]) -> list[Path]:
    """Take in every gpu_*.json of a folder; the files that were written. commit: of the code with these hashes."""
    written = []
    for path in sorted(folder.glob("gpu_*.json")):
        target = results / path.name
        if path.stem == MERGED:
            records = read_records(target)
            records.merge(read_records(path))
            records.stamp(commit, codes)
            save(target, records)
        else:
            tree = json.loads(path.read_text("utf-8"))
            if tree["commit"] == UNKNOWN and tree.get("code") in codes:
                tree["commit"] = commit
            target.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", "utf-8")
        written.append(target)
    return written


def main() -> int:
    """Take in, and print the table. 1 when the folder holds no results."""
    written = adopt(Path(sys.argv[1]), RESULTS, current_commit(), (code_hash(OUR_CODE), code_hash(PEER_CODE)))
    for path in written:
        print(path)
        if path.stem == MERGED:
            show(Console(width=None if sys.stdout.isatty() else 180), read_records(path))
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
