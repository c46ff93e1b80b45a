"""The server against its own OpenAPI: schemathesis asks what the schema allows and what it forbids.

No answer may be a 5xx, each must be one that the schema documents, in its form, and what the schema forbids must be
refused; with a key and without one. One check is left out: that everything that the schema allows is accepted. JSON
Schema has no words for rules between fields (`stream_options` needs `stream`) and takes 5.0 for an integer.

schemathesis runs in an environment of its own (sh benchmarks/prepare_clients.sh); the server has a tiny random base.
Run: python -m benchmarks.serve_schemathesis [--examples 100]     writes benchmarks/results/serve_schemathesis.json
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import REPOSITORY, Row, at_most, write
from tenon.serve.front.access import Access
from tenon.tenants.keys import KeyStore
from tenon.tenants.usage import UsageBook
from tests.serve.house import House, make_house, serving

SCHEMATHESIS = REPOSITORY / ".venvs" / "schemathesis" / "bin" / "schemathesis"
HOOKS = REPOSITORY / "tests" / "serve" / "clients" / "schemathesis_hooks.py"
SEED = 1


@dataclass(frozen=True, slots=True)
class Tried:
    """cases: requests that were made up. failures: those whose answer was not as it must be. text: all that it said."""

    cases: int
    failures: int
    text: str


def tried(house: House, folder: Path, *, phases: str, examples: int, keyed: bool) -> Tried:
    """Ask a server with or without keys, the same requests every time."""
    access, words = None, list[str]()
    if keyed:
        store = KeyStore(folder / "keys.json")
        access = Access(store, UsageBook(folder / "usage.db"))
        words = ["--header", f"Authorization:Bearer {store.create('tester')[0]}"]
    with serving(house, access=access) as running:
        words += ["--phases", phases, "--max-examples", str(examples), "--seed", str(SEED), "--no-color"]
        words += ["--exclude-checks", "positive_data_acceptance", "--mode", "all", "--continue-on-failure"]
        # What the health checks find slow is this machine, not the server.
        words += ["--suppress-health-check", "all", "--warnings", "off", "--request-timeout", "120"]
        done = subprocess.run(
            [str(SCHEMATHESIS), "run", running.url.removesuffix("/v1") + "/openapi.json", *words],
            cwd=folder,
            env={**os.environ, "SCHEMATHESIS_HOOKS": HOOKS.stem, "PYTHONPATH": str(HOOKS.parent)},
            capture_output=True,
            text=True,
            check=False,
        )
    text = done.stdout + done.stderr
    found = re.search(r"(\d+) generated(?:, (\d+) found)?", text)
    if found is None:
        raise RuntimeError(f"schemathesis ended with {done.returncode}: {text}")
    failures = int(found[2] or 0)
    return Tried(int(found[1]), failures if done.returncode in (0, 1) else failures + 1, text)


def main() -> None:
    """Ask both servers, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=100)
    examples = parser.parse_args().examples
    if not SCHEMATHESIS.is_file():
        raise SystemExit(f"{SCHEMATHESIS} is not there: sh benchmarks/prepare_clients.sh")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as made:
        house = make_house(Path(made) / "house")
        for keyed in (False, True):
            found = tried(house, Path(made), phases="coverage,fuzzing", examples=examples, keyed=keyed)
            how = "with a key" if keyed else "without keys"
            print(found.text)
            rows += [
                Row(f"{how}: requests made up from the schema", found.cases, "requests"),
                at_most(f"{how}: answers that are not as they must be", found.failures, "answers", 0),
            ]
    done = subprocess.run([str(SCHEMATHESIS), "--version"], capture_output=True, text=True, check=True)
    print(write("serve_schemathesis", rows, versions={"schemathesis": done.stdout.split()[-1]}))
    sys.exit(any(row.met is False for row in rows))


if __name__ == "__main__":
    main()
