"""The resident base: found again, checked to be the one that was planned, loaded once, with an empty bank beside it.

This module does not know what the base is wanted for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tenon.adapters.bank import AdapterBank
from tenon.data.render import Renderer
from tenon.data.template import read_template
from tenon.data.tokenizer import load_tokenizer
from tenon.errors import PlanError
from tenon.models.decoder import Decoder
from tenon.models.load import load_decoder
from tenon.models.shards import Sharing
from tenon.plan.values import BasePlan, Frozen, MachineFacts, Precision
from tenon.ranks.group import ALONE, Ranks, rank_device

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Workbench:
    """A base ready for work. folder: its files in Hugging Face's layout (tokenizer and template among them)."""

    folder: Path
    decoder: Decoder
    bank: AdapterBank

    def renderer(self, template: str | None) -> Renderer:
        """The renderer of this base; template: a file instead of the base's own chat template.

        Raises DataError data-template-file.
        """
        return Renderer(load_tokenizer(self.folder), read_template(template))


def load_workbench(
    folder: Path,
    base: BasePlan,
    machine: MachineFacts,
    precision: Precision,
    *,
    frozen: Frozen | None = None,
    ride_rank: int = 0,
    shelf_rank: int = 0,
    ranks: Ranks = ALONE,
    sharing: Sharing | None = None,
) -> Workbench:
    """Load the decoder onto the planned device. Raises PlanError plan-device-missing when there is none.

    frozen: what the linear weights are kept in. ride_rank: rank of the one slot that will be trained, else 0.
    shelf_rank: see `Decoder`. ranks: each has a device of its own, and its part of a CPU's threads. sharing: with whom
    the layers are shared, if at all.
    """
    frozen = frozen or Frozen()
    if machine.device == "cuda" and not torch.cuda.is_available():
        raise PlanError(
            "plan-device-missing",
            f"the plan wants a GPU ({machine.device_name}), and torch finds none here",
            hint="run on a machine with a GPU, or plan with device=cpu",
        )
    torch.set_num_threads(max(1, machine.threads // ranks.count))
    # cuDNN plans anew for every new shape (about 170 ms), and packed rows bring new shapes all the time.
    torch.backends.cuda.enable_cudnn_sdp(False)
    device, dtype = rank_device(machine.device, ranks), DTYPES[precision]
    decoder = load_decoder(
        folder,
        base.facts,
        dtype=dtype,
        device=device,
        kind=frozen.format,
        compute_fp8=frozen.fp8_compute,
        fp8_twice=frozen.fp8_twice,
        ride_rank=ride_rank,
        shelf_rank=shelf_rank,
        sharing=sharing,
    )
    return Workbench(folder, decoder, AdapterBank(base.facts, dtype=dtype, device=device))
