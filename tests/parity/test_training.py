"""Fifty steps against PEFT and a plain loop; four slots together against each alone; adapter files both ways."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tenon.adapters.bank import AdapterBank, SiteShape, SlotShape, initialise
from tenon.adapters.peft_files import load_adapter, read_adapter, write_adapter
from tenon.bases.facts import MODULE_PATHS, ModelFacts, site_name
from tenon.bases.read import folder_facts
from tenon.batch import NO_SLOT
from tenon.data.pack import PackOptions, PackRow, bare_row, pack_rows
from tenon.errors import AdapterError
from tenon.models.decoder import Decoder
from tenon.models.load import load_decoder
from tests.parity.our_loop import optimizer_plan, peft_tensors, train_slots
from tests.parity.peft_loop import train_with_peft
from tests.tiny import CPU, random_slot, slot_shape

VOCAB = 97


def tiny_config() -> LlamaConfig:
    """A tiny llama."""
    return LlamaConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=VOCAB,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random llama in transformers' files."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).save_pretrained(str(folder))
    return folder


def open_base(folder: Path) -> tuple[ModelFacts, Decoder]:
    facts = folder_facts(folder)
    return facts, load_decoder(folder, facts, dtype=torch.float32, device=CPU)


def make_windows(steps: int, slots: int, *, rows: int = 4, seed: int = 0) -> list[list[PackRow]]:
    """Rows with something to learn: the second half repeats the first, and is supervised."""
    draw = np.random.default_rng(seed)
    windows = []
    for _ in range(steps):
        window = []
        for slot in range(slots):
            for _ in range(rows):
                half = draw.integers(3, VOCAB, int(draw.integers(3, 14)))
                ids = np.concatenate([half, half]).astype(np.int64)
                window.append(PackRow(slot, ids, np.arange(len(ids)) >= len(half)))
        windows.append(window)
    return windows


def test_fifty_steps_against_peft_and_a_plain_loop(base: Path, tmp_path: Path) -> None:
    """The loss of every step within 1e-5 relative, the adapter within 1e-4."""
    facts, decoder = open_base(base)
    bank = AdapterBank(facts, dtype=torch.float32, device=CPU)
    bank.add("own", slot_shape(facts, rank=8, scale=2.0), trained=True)
    initialise(bank.slots[0], "kaiming", 3)
    start = tmp_path / "start"
    start.mkdir()
    write_adapter(start, bank.slots[0], base=str(base))
    windows, plan = make_windows(2, 1) * 25, optimizer_plan(2e-3)
    factors = [1.0 - i / 50 for i in range(50)]
    theirs = train_with_peft(base, start, windows, plan, factors)
    ours = train_slots(decoder, bank, windows, {0: plan}, factors)[0]
    assert ours[-1] < 0.8 * ours[0]
    np.testing.assert_allclose(ours, theirs.losses, rtol=1e-5)
    tensors = peft_tensors(bank, 0, tmp_path / "end")
    assert set(tensors) == set(theirs.tensors) and len(tensors) == 2 * 7 * 3
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, theirs.tensors[name], rtol=0, atol=1e-4, msg=name)


def test_p06_four_slots_trained_together_are_those_trained_alone(base: Path) -> None:
    """Different rank, targets and learning rate: every matrix within 1e-5 after twenty steps."""
    facts, decoder = open_base(base)
    shapes = [
        slot_shape(facts, rank=16, scale=1.0),
        slot_shape(facts, rank=2, scale=4.0, modules=("q_proj", "v_proj")),
        slot_shape(facts, rank=8, scale=2.0, modules=("gate_proj", "up_proj", "down_proj")),
        slot_shape(facts, rank=4, scale=2.0, modules=("k_proj", "o_proj")),
    ]
    plans = [optimizer_plan(lr) for lr in (1e-3, 2e-3, 2e-4, 5e-4)]
    windows = make_windows(20, 4, rows=3, seed=1)

    def run(slots: list[int]) -> dict[int, torch.Tensor]:
        bank = AdapterBank(facts, dtype=torch.float32, device=CPU)
        for slot, shape in enumerate(shapes):
            bank.add(str(slot), shape, trained=True)
            initialise(bank.slots[slot], "kaiming", slot)
        own = [[row for row in window if row.slot in slots] for window in windows]
        train_slots(decoder, bank, own, {s: plans[s] for s in slots}, [1.0] * len(own), micro_tokens=100)
        return {s: bank.slots[s].parameters_P for s in slots}

    together = run([0, 1, 2, 3])
    for slot in range(4):
        torch.testing.assert_close(together[slot], run([slot])[slot], rtol=0, atol=1e-5)


def peft_logits(base: Path, adapter: Path, ids: list[int]) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def our_logits(decoder: Decoder, bank: AdapterBank, slot: int, ids: list[int]) -> torch.Tensor:
    (batch,) = pack_rows([bare_row(slot, ids)], PackOptions(999), CPU)
    with torch.no_grad():
        return decoder.logits(decoder.forward(batch, bank))


IDS = [5, 9, 77, 3, 42, 8, 8, 61, 90, 12, 33]


@pytest.mark.parametrize("kind", ["all", "qv", "layers", "ragged", "ranks", "rslora"])
def test_p19_our_files_in_peft(base: Path, tmp_path: Path, kind: str) -> None:
    facts, decoder = open_base(base)
    bank = AdapterBank(facts, dtype=torch.float32, device=CPU)
    shape = slot_shape(facts, rank=4)
    if kind == "qv":
        shape = slot_shape(facts, rank=4, modules=("q_proj", "v_proj"))
    if kind == "layers":
        shape = SlotShape({s: v for s, v in shape.sites.items() if s.startswith(("layers.1.", "layers.2."))})
    if kind == "ragged":
        names = [site_name(0, "q_proj"), site_name(2, "down_proj"), site_name(1, "o_proj"), site_name(1, "q_proj")]
        shape = SlotShape({name: SiteShape(3, 0.7) for name in names})
    if kind == "ranks":
        shape = SlotShape({s: SiteShape(2 + i % 3, 0.5 + i % 2) for i, s in enumerate(shape.sites)})
    random_slot(bank, shape, 1)
    write_adapter(tmp_path, bank.slots[0], base=str(base), rslora=kind == "rslora")
    ours, theirs = our_logits(decoder, bank, 0, IDS), peft_logits(base, tmp_path, IDS)
    assert (ours - our_logits(decoder, bank, NO_SLOT, IDS)).abs().max() > 1e-2
    assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["list", "regex", "patterns", "rslora", "layers"])
def test_pefts_files_in_ours(base: Path, tmp_path: Path, kind: str) -> None:
    options = {
        "list": {"target_modules": list(MODULE_PATHS)},
        "regex": {"target_modules": r".*layers\.[02]\..*(q|down)_proj"},
        "patterns": {
            "target_modules": ["q_proj", "up_proj", "o_proj"],
            "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.up_proj": 6},
            "alpha_pattern": {"o_proj": 5},
        },
        "rslora": {"target_modules": ["v_proj"], "use_rslora": True},
        "layers": {"target_modules": ["k_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    }[kind]
    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_alpha=7, task_type="CAUSAL_LM", init_lora_weights=False, **options)  # type: ignore[arg-type]
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    theirs.save_pretrained(str(tmp_path))
    facts, decoder = open_base(base)
    bank = AdapterBank(facts, dtype=torch.float32, device=CPU)
    slot = load_adapter(bank, "theirs", read_adapter(tmp_path))
    assert (our_logits(decoder, bank, slot, IDS) - peft_logits(base, tmp_path, IDS)).abs().max() <= 1e-5


def spoil(folder: Path, how: str) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    first = sorted(tensors)[0]
    if how == "missing":
        del tensors[first]
    elif how == "extra":
        tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(4, 4)
    elif how == "shape":
        tensors[first] = torch.zeros(4, 7)
    elif how == "nan":
        tensors[first][0, 0] = float("nan")
    elif how == "rank":
        config["r"] = 5
    elif how == "dora":
        config["use_dora"] = True
    elif how == "target":
        config["target_modules"].append("lm_head")
    elif how == "layer":
        # Whole in itself, but of a deeper base.
        tensors = {name.replace("layers.2.", "layers.9."): tensor for name, tensor in tensors.items()}
        config["layers_to_transform"] = [0, 1, 9]
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if how == "truncated":
        whole = (folder / "adapter_model.safetensors").read_bytes()
        (folder / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    if how == "pickle":
        (folder / "adapter_model.safetensors").unlink()
        (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")


@pytest.mark.parametrize(
    ("how", "code", "named"),
    [
        ("missing", "adapter-tensors", "lora_A"),
        ("extra", "adapter-tensors", "lm_head"),
        ("shape", "adapter-tensors", "down_proj"),
        ("nan", "adapter-not-finite", "down_proj"),
        ("rank", "adapter-tensors", "rank 5"),
        ("dora", "adapter-unsupported", "use_dora"),
        ("target", "adapter-tensors", "lm_head"),
        ("layer", "adapter-target-missing", "layers.9."),
        ("truncated", "adapter-tensors", "cannot be read"),
        ("pickle", "adapter-missing", "safetensors"),
    ],
)
def test_p14_p15_p35_a_spoilt_adapter_is_refused_by_name(
    tmp_path: Path, how: str, code: str, named: str, base: Path
) -> None:
    facts, _ = open_base(base)
    bank = AdapterBank(facts, dtype=torch.float32, device=CPU)
    random_slot(bank, slot_shape(facts, rank=4), 1)
    write_adapter(tmp_path, bank.slots[0], base=str(base))
    spoil(tmp_path, how)
    with pytest.raises(AdapterError) as caught:
        load_adapter(bank, "spoilt", read_adapter(tmp_path))
    assert caught.value.code == code
    assert named in str(caught.value)
    assert list(bank.slots) == [0]


def test_p15_weights_that_are_not_finite_are_never_written(tmp_path: Path, base: Path) -> None:
    facts, _ = open_base(base)
    bank = AdapterBank(facts, dtype=torch.float32, device=CPU)
    random_slot(bank, slot_shape(facts), 1)
    bank.slots[0].parameters_P[17] = float("inf")
    with pytest.raises(AdapterError, match="adapter-not-finite"):
        write_adapter(tmp_path, bank.slots[0], base="b")
    assert not list(tmp_path.iterdir())
