"""Whether a folder is an adapter that Tenon, PEFT and vLLM agree about: told from its files, without torch.

Strict: each matrix that the config promises is in the file, each tensor in the file is promised, ranks and shapes fit,
every weight is finite, and nothing that can run code lies beside them. This module does not know bases or registries.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from tenon.bases.facts import MODULE_PATHS
from tenon.errors import AdapterError
from tenon.registry.safetensors_header import TensorFacts, first_not_finite, parse_header, read_header
from tenon.units import format_bytes

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
MAX_RANK = 2048
MAX_FILE_BYTES = 16_000_000_000
_MAX_CONFIG_BYTES = 4_000_000
_PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
_TENSOR = re.compile(r"base_model\.model\.model\.(layers\.\d+\.(?:self_attn|mlp)\.(\w+))\.lora_([AB])\.weight")
# Keys of rank_pattern and alpha_pattern are regular expressions from a file that nobody vouches for: without groups and
# with few repeats they cannot be made to run for ever.
_PLAIN_PATTERN = re.compile(r"[\w.\\^$|\[\]*+-]{1,200}")
_REPEATS = re.compile(r"[*+]")
# Features of PEFT's LoRA that change what an adapter computes and that Tenon does not run: (key, values that are fine).
_REFUSED: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("use_dora", (False, None)),
    ("bias", ("none", None)),
    ("lora_bias", (False, None)),
    ("fan_in_fan_out", (False, None)),
    ("modules_to_save", ([], None)),
    ("target_parameters", ([], None)),
    ("trainable_token_indices", ([], {}, None)),
    ("alora_invocation_tokens", ([], None)),
    ("layer_replication", ([], None)),
)


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What an adapter's files say. rank, alpha, scale: of most of its matrices; sites: adapted matrices, sorted.

    ranks_and_scales: of every site, (rank, factor on B A x).
    """

    rank: int
    alpha: float
    scale: float
    targets: tuple[str, ...]
    sites: tuple[str, ...]
    ranks_and_scales: dict[str, tuple[int, float]]
    parameters: int
    config: dict[str, Any]


def check_adapter(folder: Path) -> AdapterFacts:
    """Check an adapter folder that is to be kept, and say what it is: `describe_adapter`, and no pickle beside it.

    Raises AdapterError adapter-pickle, and those of `describe_adapter`.
    """
    pickles = sorted(place.name for place in folder.glob("*") if place.suffix in _PICKLES) if folder.is_dir() else []
    if pickles:
        raise AdapterError(
            "adapter-pickle",
            f"{folder}: {pickles[0]} is a pickle, which can run code when it is loaded",
            hint=f"keep only {CONFIG_NAME} and {TENSORS_NAME}; PEFT's save_pretrained writes them",
        )
    return describe_adapter(folder)


def describe_adapter(folder: Path) -> AdapterFacts:
    """Check the two files of an adapter and say what they hold; whatever else lies in the folder is not looked at.

    Raises AdapterError adapter-missing, adapter-too-large, adapter-config, adapter-unsupported, adapter-rank,
    adapter-tensors, adapter-not-finite, each naming the file and what is wrong in it.
    """
    _check_files(folder)
    path = folder / TENSORS_NAME
    try:
        tensors = read_header(path)
    except ValueError as error:
        raise _tensor_error(path, f"cannot be read: {error}") from error
    return _describe(folder, (folder / CONFIG_NAME).read_bytes(), tensors, path)


def describe_contents(folder: Path, contents: Mapping[str, bytearray]) -> tuple[AdapterFacts, dict[str, TensorFacts]]:
    """`describe_adapter` of files that were read, by name, and where the tensors lie in what was read.

    folder: where they were, for the words of errors alone. Raises as `describe_adapter`.
    """
    content = contents[TENSORS_NAME]
    try:
        tensors = parse_header(BytesIO(content), len(content))
    except ValueError as error:
        raise _tensor_error(folder / TENSORS_NAME, f"cannot be read: {error}") from error
    return _describe(folder, bytes(contents[CONFIG_NAME]), tensors, content), tensors


def _describe(
    folder: Path, config_json: bytes, tensors: dict[str, TensorFacts], content: Path | bytearray
) -> AdapterFacts:
    config, path = _read_config(folder / CONFIG_NAME, config_json), folder / TENSORS_NAME
    pairs = _pairs(path, tensors)
    sizes = _ranks_and_alphas(folder, config, pairs)
    _check_promised(path, config, set(pairs))
    broken = first_not_finite(content, tensors)
    if broken is not None:
        raise AdapterError(
            "adapter-not-finite",
            f"{path}: tensor {broken} holds NaN or infinity",
            hint="take an earlier version of the adapter, or train again with a lower learning rate",
        )
    root = bool(config.get("use_rslora"))
    (rank, alpha), _ = Counter(sizes.values()).most_common(1)[0]
    modules = {site.rsplit(".", 1)[1] for site in pairs}
    return AdapterFacts(
        rank=rank,
        alpha=alpha,
        scale=_scale(rank, alpha, root=root),
        targets=tuple(module for module in MODULE_PATHS if module in modules),
        sites=tuple(sorted(pairs)),
        ranks_and_scales={site: (r, _scale(r, a, root=root)) for site, (r, a) in sizes.items()},
        parameters=sum(a.shape[0] * a.shape[1] + b.shape[0] * b.shape[1] for a, b in pairs.values()),
        config=config,
    )


def _scale(rank: int, alpha: float, *, root: bool) -> float:
    """The factor on B A x: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
    return alpha / (rank**0.5 if root else rank)


def _check_files(folder: Path) -> None:
    for name, most_bytes in ((CONFIG_NAME, _MAX_CONFIG_BYTES), (TENSORS_NAME, MAX_FILE_BYTES)):
        path = folder / name
        if not path.is_file():
            raise AdapterError(
                "adapter-missing",
                f"{folder} is no adapter: it has no {name}",
                hint="give a folder in PEFT's layout, or the name of a registered adapter: tenon adapters list",
            )
        if path.stat().st_size > most_bytes:
            raise AdapterError(
                "adapter-too-large",
                f"{path}: no adapter file is larger than {format_bytes(most_bytes)}",
                got=format_bytes(path.stat().st_size),
                hint="is it a whole model? give the folder of an adapter",
            )


def _read_config(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _config_error(path, "is no valid JSON", got=str(error)[:200]) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise _config_error(path, "does not describe a LoRA adapter", got=f"peft_type {kind}")
    for key, fine in _REFUSED:
        if config.get(key) not in fine:
            raise AdapterError(
                "adapter-unsupported",
                f"{path} asks for {key}, which would be lost here",
                got=str(config[key])[:200],
                hint="merge the adapter with PEFT, or train it again without that feature",
            )
    for key, fine in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(fine(value) for value in pattern.values()):
            raise _config_error(path, f"has a {key} that is no table of numbers", got=str(pattern)[:200])
    if not _is_rank(config.get("r")) or not _is_alpha(config.get("lora_alpha", config.get("r"))):
        got = f"r {config.get('r')!r}, lora_alpha {config.get('lora_alpha')!r}"
        raise _config_error(path, "has no rank r, or its lora_alpha is no number", got=got)
    ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
    if not all(1 <= rank <= MAX_RANK for rank in ranks):
        raise AdapterError(
            "adapter-rank",
            f"{path}: a rank lies between 1 and {MAX_RANK}",
            got=str(next(rank for rank in ranks if not 1 <= rank <= MAX_RANK)),
            hint="train the adapter with a smaller rank",
        )
    return config


def _pairs(path: Path, tensors: dict[str, TensorFacts]) -> dict[str, tuple[TensorFacts, TensorFacts]]:
    """Site -> (A, B)."""
    found: dict[str, dict[str, TensorFacts]] = {}
    for name, facts in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None or match[2] not in MODULE_PATHS or not match[1].endswith(MODULE_PATHS[match[2]]):
            raise _tensor_error(path, f"tensor {name} belongs to no linear module that Tenon adapts")
        if len(facts.shape) != 2:
            raise _tensor_error(path, f"tensor {name} is no matrix", got=str(list(facts.shape)))
        found.setdefault(match[1], {})[match[3]] = facts
    if not found:
        raise _tensor_error(path, "there is no LoRA matrix in the file")
    for site, pair in found.items():
        for letter in "AB":
            if letter not in pair:
                raise _tensor_error(path, f"{site} has no lora_{letter}")
    return {site: (pair["A"], pair["B"]) for site, pair in found.items()}


def _ranks_and_alphas(
    folder: Path, config: dict[str, Any], pairs: dict[str, tuple[TensorFacts, TensorFacts]]
) -> dict[str, tuple[int, float]]:
    """Site -> (rank, alpha) as the config promises them; the matrices must be of that rank."""
    rank_of = _Pattern(config, "rank_pattern", default=config["r"], path=folder / CONFIG_NAME)
    default_alpha = config.get("lora_alpha", config["r"])
    alpha_of = _Pattern(config, "alpha_pattern", default=default_alpha, path=folder / CONFIG_NAME)
    sizes = {}
    for site, (a, b) in pairs.items():
        rank = int(rank_of.of(site))
        if a.shape[0] != rank or b.shape[1] != rank:
            shapes = f"A {list(a.shape)}, B {list(b.shape)}"
            raise _tensor_error(folder / TENSORS_NAME, f"the matrices of {site} are not of rank {rank}", got=shapes)
        sizes[site] = (rank, float(alpha_of.of(site)))
    return sizes


class _Pattern:
    """PEFT's rank_pattern or alpha_pattern: the first key that matches the end of a module's name decides."""

    def __init__(self, config: dict[str, Any], key: str, *, default: float, path: Path) -> None:
        self._default = default
        self._rows = [(self._compile(text, key, path), value) for text, value in (config.get(key) or {}).items()]

    def of(self, site: str) -> float:
        """The value for one matrix."""
        name = f"model.{site}"
        return next((value for pattern, value in self._rows if pattern.fullmatch(name)), self._default)

    def _compile(self, text: str, key: str, path: Path) -> re.Pattern[str]:
        """The key as a regular expression, if it is one that no name can make slow."""
        if not _PLAIN_PATTERN.fullmatch(text) or len(_REPEATS.findall(text)) > 3:
            raise _config_error(path, f"has a {key} that is too complicated", got=text[:100])
        try:
            return re.compile(rf"(.*\.)?({text})")
        except re.error as error:
            raise _config_error(path, f"has a bad {key}", got=text[:100]) from error


def _check_promised(path: Path, config: dict[str, Any], sites: set[str]) -> None:
    """Every module that the config lists has its matrices, in every layer that it lists."""
    targets = config.get("target_modules")
    if not isinstance(targets, list):
        return  # a pattern: which modules it means depends on the base
    layers = config.get("layers_to_transform")
    wanted = [layers] if isinstance(layers, int) else layers if isinstance(layers, list) else None
    for target in targets:
        mine = [site for site in sites if f".model.{site}".endswith(f".{target}")]
        if not mine:
            raise _tensor_error(path, f"{CONFIG_NAME} names the target {target}, but no tensor belongs to it")
        for layer in wanted or ():
            if not any(site.startswith(f"layers.{layer}.") for site in mine):
                raise _tensor_error(path, f"{CONFIG_NAME} promises {target} in layer {layer}, but the file lacks it")


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_alpha(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9


def _config_error(path: Path, what: str, *, got: str) -> AdapterError:
    return AdapterError(
        "adapter-config", f"{path} {what}", got=got, hint="copy it again; Tenon reads PEFT adapters of type LORA"
    )


def _tensor_error(path: Path, what: str, *, got: str = "") -> AdapterError:
    return AdapterError(
        "adapter-tensors", f"{path}: {what}", got=got, hint="the file is damaged or incomplete: copy it again"
    )
