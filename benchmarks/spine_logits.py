"""Logits against transformers: tiny random models of every family and variant, packed and alone, fp32.

Run: python -m benchmarks.spine_logits
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from pathlib import Path

import gguf

from benchmarks.report import Row, at_most, write
from tenon.settings import Settings
from tests.parity.logits import BOUND, Differences, load_spec, measure
from tests.tiny_bases import GGUF_VARIANTS, VARIANTS, random_model, save_base, write_gguf

KINDS = ("F32", "Q8_0")


def main() -> None:
    """Measure all variants and write the worst of each family."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        settings = Settings(home=root, cache=root / "cache", offline=True, threads=0, debug=False)
        rows = folder_rows(root, settings) + gguf_rows(root, settings)
    rows.insert(0, at_most("worst of all", max(row.value for row in rows), "max abs difference of logits", BOUND))
    path = write("spine_logits", rows)
    for row in rows:
        print(f"{row.what}: {row.value:.2e} {row.unit} ({row.bound}: {'ok' if row.met else 'SHORT'})")
    print(path)


def folder_rows(root: Path, settings: Settings) -> list[Row]:
    """Per family, from folders in transformers' layout."""
    measured: dict[str, list[Differences]] = defaultdict(list)
    for variant, make in VARIANTS.items():
        folder = root / variant
        model = save_base(variant, folder)
        measured[make().model_type].append(measure(load_spec(str(folder), settings), model))
    rows: list[Row] = []
    for family, found in measured.items():
        rows += worst(f"{family} ({len(found)} variants)", found)
    return rows


def gguf_rows(root: Path, settings: Settings) -> list[Row]:
    """All families together, from GGUF files."""
    rows: list[Row] = []
    for kind in KINDS:
        found: list[Differences] = []
        for variant in GGUF_VARIANTS:
            model, path = random_model(variant), root / f"{variant}-{kind}.gguf"
            write_gguf(model, path, kind=gguf.GGMLQuantizationType[kind])
            found.append(measure(load_spec(str(path), settings), model))
        rows += worst(f"GGUF {kind} ({len(found)} variants)", found)
    return rows


def worst(what: str, found: list[Differences]) -> list[Row]:
    """The largest difference, packed and alone."""
    unit = "max abs difference of logits"
    return [
        at_most(f"{what}, packed", max(d.packed for d in found), unit, BOUND),
        at_most(f"{what}, alone", max(d.alone for d in found), unit, BOUND),
    ]


if __name__ == "__main__":
    main()
