"""lm-eval over HTTP against lm-eval in process: the same numbers, for the base and for an adapter.

One side is lm-eval's `local-completions` on a real `tenon serve`, with the server's own tokeniser, as a user would run
it; the other is lm-eval's `hf` with PEFT on the same weights in fp32. The tasks are `benchmarks/lm_eval_task`: choices,
answers and running text made from `recipes/home`. Every reported number and every single likelihood is compared.
lm-eval runs in an environment of its own (sh benchmarks/prepare_clients.sh), and nothing is fetched.

Run: python -m benchmarks.serve_lm_eval [--rows 60]        writes benchmarks/results/serve_lm_eval.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import REPOSITORY, Row, at_least, at_most, write
from benchmarks.serving_adapters import make_adapters
from tenon.bases.locate import locate_base
from tenon.models.prepare import prepare_base
from tenon.settings import Settings, child_environment, read_settings

BASE, ADAPTER, BOUND = "smollm2-135m", "judged-16", 1e-4
TASKS = REPOSITORY / "benchmarks" / "lm_eval_task"
NAMES = ("home_choice", "home_answer", "home_rolling")
PYTHON = REPOSITORY / ".venvs" / "lmeval" / "bin" / "python"


@dataclass(frozen=True, slots=True)
class Side:
    """What one lm-eval said: its numbers by task and metric, and what each document got."""

    numbers: dict[str, float]
    documents: dict[str, list[Any]]


def main() -> None:
    """Evaluate both sides for base and adapter, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=60)
    count = parser.parse_args().rows
    if not PYTHON.is_file():
        raise SystemExit(f"{PYTHON} is not there: sh benchmarks/prepare_clients.sh")
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        settings = Settings(home=root / "home", cache=read_settings().cache, offline=True, threads=0, debug=False)
        folder = prepare_base(locate_base(BASE, settings), settings)
        (adapter,) = make_adapters(root / "peft", BASE, ranks=(16,), prefix="judged", settings=settings)
        make_data(root, count)
        rows = [Row("documents of each task", count, "documents")]
        with served(settings) as url:
            for model, peft in (("base", None), (ADAPTER, adapter.folder)):
                over_http = evaluate(root, f"http-{model}", "local-completions", _http(url, model))
                in_process = evaluate(root, f"hf-{model}", "hf", _hf(folder, peft))
                rows += compare(model, over_http, in_process)
    versions = _versions()
    for row in rows:
        print(f"{row.what}: {row.value:.6g} {row.unit}{f' ({row.bound})' if row.bound else ''}")
    print(write("serve_lm_eval", rows, versions=versions))
    sys.exit(any(row.met is False for row in rows))


def _http(url: str, model: str) -> str:
    return f"base_url={url}/v1/completions,model={model},num_concurrent=4,max_length=2048"


def _hf(folder: Path, peft: Path | None) -> str:
    return f"pretrained={folder},dtype=float32,max_length=2047" + ("" if peft is None else f",peft={peft}")


def make_data(root: Path, count: int) -> None:
    """The documents of the three tasks, from the rows that the quickstart is judged on."""
    lines = (REPOSITORY / "recipes" / "home" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [tuple(message["content"] for message in json.loads(line)["messages"][-2:]) for line in lines]
    draw = random.Random(0)
    commands = sorted({command for _, command in pairs})
    shown = "".join(f"Sentence: {sentence}\nCommand: {command}\n\n" for sentence, command in pairs[:3])
    asked = pairs[3 : 3 + count]
    choices, answers, texts = [], [], []
    for number, (sentence, command) in enumerate(asked):
        offered = [*draw.sample([other for other in commands if other != command], 3), command]
        draw.shuffle(offered)
        choices.append({"sentence": sentence, "commands": offered, "wanted": offered.index(command)})
        answers.append({"shown": shown, "sentence": sentence, "command": command})
        texts.append({"text": " ".join(text for text, _ in pairs[number : number + 12])})
    for name, documents in (("choice", choices), ("answer", answers), ("rolling", texts)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))


@contextmanager
def served(settings: Settings) -> Iterator[str]:
    """A real server; its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tenon.cli.main", "serve", BASE, "--port", "0", "--json"],
        env=child_environment(settings),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.terminate()
        process.wait(60)


def evaluate(root: Path, name: str, kind: str, arguments: str) -> Side:
    """lm-eval's own command, in a folder with the data."""
    out = root / name
    words = ["--model", kind, "--model_args", arguments, "--tasks", ",".join(NAMES), "--include_path", str(TASKS)]
    words += ["--batch_size", "4", "--output_path", str(out), "--log_samples"]
    words += ["--device", "cpu"] if kind == "hf" else []
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(root / "hf")}
    environment["OPENAI_API_KEY"] = "none"
    subprocess.run([str(PYTHON), "-m", "lm_eval", *words], cwd=root, env=environment, check=True)
    (results,) = out.rglob("results_*.json")
    numbers = {
        f"{task} {metric}": value
        for task, metrics in json.loads(results.read_text())["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float)
    }
    return Side(numbers, {task: _responses(out, task) for task in NAMES})


def _responses(out: Path, task: str) -> list[Any]:
    """What the model answered to every document, in their order."""
    (samples,) = out.rglob(f"samples_{task}_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    return [line["filtered_resps"] for line in sorted(lines, key=lambda line: line["doc_id"])]


def compare(model: str, mine: Side, theirs: Side) -> list[Row]:
    """The largest differences. A number that only one side has is a difference too."""
    assert mine.numbers.keys() == theirs.numbers.keys()
    # Perplexities and scores of 100 are compared as shares of themselves.
    most = max(abs(mine.numbers[name] - other) / max(abs(other), 1) for name, other in theirs.numbers.items())
    choices, texts = (_differences(mine, theirs, task) for task in ("home_choice", "home_rolling"))
    same = [a == b for a, b in zip(mine.documents["home_answer"], theirs.documents["home_answer"], strict=True)]
    chosen = mine.numbers["home_choice acc,none"]
    return [
        Row(f"{model}: numbers that lm-eval reports", len(mine.numbers), "numbers"),
        at_most(f"{model}: largest difference of a number", most, "", BOUND),
        Row(f"{model}: likelihoods of documents", len(choices) + len(texts), "likelihoods"),
        at_most(f"{model}: largest difference of a choice's likelihood", max(choices), "nats", BOUND),
        # Of some 150 tokens: a sum of hundreds of nats in float32.
        at_most(f"{model}: largest difference of a text's likelihood, as a share", max(texts), "", BOUND / 10),
        at_least(f"{model}: answers that are the same text", sum(same) / len(same), "share", 1.0),
        Row(f"{model}: right choices", chosen, "share"),
    ]


def _differences(mine: Side, theirs: Side, task: str) -> list[float]:
    """Of every likelihood in nats, of those above 100 nats as a share."""
    return [
        abs(a - b) / (abs(b) if abs(b) > 100 else 1)
        for one, other in zip(mine.documents[task], theirs.documents[task], strict=True)
        for a, b in zip(_likelihoods(one), _likelihoods(other), strict=True)
    ]


def _likelihoods(responses: list[Any]) -> list[float]:
    """The log likelihoods of one document: of each choice, or of all of its text."""
    return [float(each[0]) if isinstance(each, list) else float(each) for each in responses]


def _versions() -> dict[str, str]:
    asked = "import importlib.metadata as m, json; print(json.dumps({p: m.version(p) for p in %r}))"
    names = ("lm_eval", "torch", "peft", "transformers")
    done = subprocess.run([str(PYTHON), "-c", asked % (names,)], capture_output=True, text=True, check=True)
    return {f"{name} (lm-eval's side)": version for name, version in json.loads(done.stdout).items()}


if __name__ == "__main__":
    main()
