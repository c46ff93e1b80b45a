"""Load a base's weights from safetensors into the decoder, tensor by tensor, strictly.

This module knows files and names; what the tensors mean, and which there must be, is the decoder's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tenon.bases.facts import ModelFacts
from tenon.bases.weights import read_header, weight_files
from tenon.errors import BaseModelError
from tenon.models.bitsandbytes_files import group_modules
from tenon.models.decoder import Decoder
from tenon.models.frozen import FrozenKind
from tenon.models.shards import Sharing


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder's weights, single or sharded, on the CPU, in the order of the files.

    Each is a view of the mapped file: copy it out and let it go. Raises: BaseModelError base-not-a-model, base-empty,
    base-shard-missing, base-damaged (naming file and tensor).
    """
    # All headers first: a download that was cut off shows before anything is read.
    contents = {file: [header.name for header in read_header(file)] for file in weight_files(folder)}
    for file, names in contents.items():
        try:
            with safe_open(os.fspath(file), framework="pt", device="cpu") as reader:
                for name in names:
                    yield name, reader.get_tensor(name)
        except SafetensorError as error:
            raise BaseModelError(
                "base-damaged", f"{file} cannot be read", got=str(error)[:160], hint="download the file again"
            ) from error


def load_decoder(
    folder: Path,
    facts: ModelFacts,
    *,
    dtype: torch.dtype,
    device: torch.device,
    kind: FrozenKind = "dense",
    compute_fp8: bool = False,
    fp8_twice: bool = True,
    ride_rank: int = 0,
    shelf_rank: int = 0,
    sharing: Sharing | None = None,
) -> Decoder:
    """A decoder with the folder's weights, converted to `dtype` on `device`, and quantised there, a module at a time.

    kind, compute_fp8, fp8_twice, ride_rank, shelf_rank, sharing: see `Decoder`.

    Raises: BaseModelError as `read_tensors`, and base-tensor-missing, base-tensor-unexpected, base-tensor-shape.
    """
    decoder = Decoder(
        facts,
        dtype=dtype,
        device=device,
        kind=kind,
        compute_fp8=compute_fp8,
        fp8_twice=fp8_twice,
        ride_rank=ride_rank,
        shelf_rank=shelf_rank,
        sharing=sharing,
    )
    decoder.load_tensors(group_modules(read_tensors(folder)))
    return decoder
