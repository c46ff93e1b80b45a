"""`tenon adapters`: list, show, verify, export, import, remove."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from tenon.registry.store import Registry
from tenon.settings import Settings

from ..registry.samples import DRAFT, write_adapter
from .conftest import Command


@pytest.fixture
def registry(tmp_path: Path, fake_settings: Settings) -> Registry:
    """Two versions of `helper`."""
    registry = Registry(fake_settings.registry)
    source = write_adapter(tmp_path / "source")
    registry.register("helper", source, DRAFT)
    registry.register("helper", source, DRAFT)
    return registry


def test_an_empty_registry_says_what_to_do(tenon: Command) -> None:
    done = tenon("adapters", "list")
    assert done.status == 0 and done.out == "" and "tenon train" in done.err
    assert tenon("adapters", "list", "--json").out == "[]\n"


def test_list_and_show(tenon: Command, registry: Registry) -> None:
    assert [line.split()[0] for line in tenon("adapters", "list").out.splitlines()[1:]] == ["helper@1", "helper@2"]
    shown = tenon("adapters", "show", "helper").out
    assert "helper@2" in shown and "b" * 64 in shown and "d" * 64 in shown and "rank 4, alpha 8, scale 2" in shown
    assert json.loads(tenon("adapters", "show", "helper@1", "--json").out)["version"] == 1


def test_verify_finds_a_changed_byte(tenon: Command, registry: Registry) -> None:
    assert tenon("adapters", "verify").out.splitlines() == ["helper@1: whole", "helper@2: whole"]
    file = registry.folder(registry.get("helper@2")) / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    done = tenon("adapters", "verify")
    assert done.status == 1 and done.out.splitlines() == ["helper@1: whole"]
    assert "error[adapter-damaged]" in done.err


def test_a_damaged_entry_is_named_and_the_others_listed(tenon: Command, registry: Registry) -> None:
    (registry.folder(registry.get("helper@1")) / "tenon.json").write_text("{")
    done = tenon("adapters", "list")
    assert done.status == 0 and "error[adapter-damaged]" in done.err
    assert [line.split()[0] for line in done.out.splitlines()[1:]] == ["helper@2"]
    assert tenon("adapters", "remove", "helper@1", "--yes").out == "removed helper@1\n"
    assert tenon("adapters", "list").err == ""


def test_export_and_import(tenon: Command, registry: Registry, workplace: Path) -> None:
    assert tenon("adapters", "export", "helper", "out").status == 0
    assert sorted(place.name for place in (workplace / "out").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    assert "error[adapter-export-not-empty]" in tenon("adapters", "export", "helper", "out").err
    done = tenon("adapters", "import", "copy", "out", "--base", "smollm2-135m")
    assert done.out == "copy@1\n"
    assert registry.get("copy").adapter_hash == registry.get("helper").adapter_hash


def test_what_travels_comes_in_and_goes_out(tenon: Command, registry: Registry, workplace: Path) -> None:
    tenon("adapters", "export", "helper", "out")
    template = workplace / "out" / "chat_template.jinja"
    template.write_text("{{ messages[0]['content'] }}")
    words = ("--base", "smollm2-135m", "--temperature", "0.2", "--max-tokens", "64", "--stop", "END", "--stop", "\n\n")
    done = tenon("adapters", "import", "copy", "out", *words, "--stop-token", "<|im_end|>", "--system", "Be brief.")
    assert done.out == "copy@1\n" and "with its own chat template" in done.err
    shown = tenon("adapters", "show", "copy").out
    assert 'temperature 0.2, max_tokens 64, stop "END" "\\n\\n", stop_tokens "<|im_end|>"' in shown
    assert "Be brief." in shown and "its own, kept with it" in shown
    assert "temperature 0.2" in tenon("adapters", "list").out.replace("\n", " ")
    assert json.loads(tenon("adapters", "list", "--json").out)[0]["generation"]["max_tokens"] == 64
    tenon("adapters", "export", "copy", "again")
    assert (workplace / "again" / "chat_template.jinja").read_text() == template.read_text()
    template.write_text("{% for")
    assert "error[data-template-syntax]" in tenon("adapters", "import", "bad", "out", *words).err
    none = tenon("adapters", "import", "bad", "out", *words, "--template", "nowhere.jinja")
    assert "error[data-template-file]" in none.err
    assert registry.versions("bad") == ()


def test_remove_asks_first(tenon: Command, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    done = tenon("adapters", "remove", "helper")
    assert done.status == 1 and "remove helper@2 for good?" in done.err
    assert registry.versions("helper") == (1, 2)
    assert tenon("adapters", "remove", "helper", "--yes").out == "removed helper@2\n"
    assert registry.versions("helper") == (1,)


def test_an_unknown_adapter(tenon: Command, registry: Registry) -> None:
    done = tenon("adapters", "show", "helpr")
    assert done.status == 1 and "error[adapter-unknown]" in done.err and "did you mean helper?" in done.err


def test_aliases_move_and_go_back(tenon: Command, registry: Registry) -> None:
    assert "no alias yet" in tenon("adapters", "aliases").err
    assert tenon("adapters", "alias", "helper@prod", "1").out == "helper@prod: 1\n"
    assert tenon("adapters", "alias", "helper@prod", "1:95", "2:5").out == "helper@prod: 1 95%, 2 5%\n"
    assert tenon("adapters", "aliases").out.splitlines()[1].split()[:5] == ["helper@prod", "1", "95%,", "2", "5%"]
    assert json.loads(tenon("adapters", "aliases", "--json").out)["helper@prod"]["target"]["shares"] == {
        "1": 95,
        "2": 5,
    }
    assert tenon("adapters", "rollback", "helper@prod").out == "helper@prod: 1\n"
    assert "adapter-in-use" in tenon("adapters", "remove", "helper@1", "--yes").err
    assert json.loads(tenon("adapters", "show", "helper@prod", "--json").out)["version"] == 1
    shown = tenon("adapters", "aliases").out
    assert "asked for" in shown and "from 1 95%, 2 5%" in shown, "why it stands where it does"
    done = tenon("adapters", "guard", "helper@prod", "--errors", "0.05", "--metric", "accuracy", "--drop", "0.01")
    assert done.out == "helper@prod: errors 0.05 of 20 in 600 s, accuracy 0.01\n"
    assert "errors 0.05 of 20" in tenon("adapters", "aliases").out
    done = tenon("adapters", "alias", "helper@prod", "2")
    assert done.status == 1 and "error[adapter-guard]" in done.err and "--force" in done.err
    assert tenon("adapters", "alias", "helper@prod", "1:1", "2:1", "--sticky", "--force").out == (
        "helper@prod: 1 50%, 2 50%; sticky\n"
    )
    assert tenon("adapters", "guard", "helper@prod", "--off").out == "helper@prod: no guard\n"
    assert tenon("adapters", "guard", "helper@prod").status == 2
    assert "error[recipe-metric-unknown]" in tenon("adapters", "guard", "helper@prod", "--metric", "acuracy").err
    tenon("adapters", "alias", "helper@prod", "1")
    assert tenon("adapters", "unalias", "helper@prod").out == "forgotten: helper@prod\n"
    for words in (("helper@prod", "x"), ("helper", "1")):
        done = tenon("adapters", "alias", *words)
        assert done.status == 1 and "error[adapter-bad-alias]" in done.err and "hint:" in done.err
