"""PEFT's own files go in, and what comes out PEFT loads: the same logits on both sides of the registry."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from tenon.registry.store import Registry

CONFIG = LlamaConfig(
    vocab_size=53,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
IDS = torch.tensor([[1, 5, 9, 2, 40, 7]])
LAYOUTS = {
    "all": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    "some layers": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[1], use_rslora=True),
    "patterns": LoraConfig(
        r=4,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 2, r"^model\.layers\.0\.self_attn\.q_proj": 3},
        alpha_pattern={"down_proj": 5},
    ),
    "a pattern of targets": LoraConfig(r=2, target_modules=r".*layers\.[0-9]\.mlp\..*_proj"),
}


def _base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_p19_what_peft_wrote_comes_back_to_peft_unchanged(tmp_path: Path, layout: str) -> None:
    model = get_peft_model(_base(), LAYOUTS[layout])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(tmp_path / "peft"))
    wanted = model.eval()(IDS).logits

    registry = Registry(tmp_path / "adapters")
    entry = registry.import_peft(tmp_path / "peft", "a", base_spec="tiny", base_hash="b" * 64)
    trained, _ = model.get_nb_trainable_parameters()
    assert entry.parameters == trained
    registry.export("a", tmp_path / "exported")
    got = PeftModel.from_pretrained(_base(), tmp_path / "exported").eval()(IDS).logits
    assert not torch.equal(wanted, _base()(IDS).logits)
    assert torch.equal(got, wanted)
