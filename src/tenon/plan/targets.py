"""Which matrices get an adapter: the recipe's words against the base's names, every one of them matched or refused.

Pure: knows the names of a base's linear matrices, no tensors.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from tenon.bases.facts import ATTENTION_MODULES, MLP_MODULES, MODULE_PATHS, ModelFacts, parse_site, site_name
from tenon.errors import PlanError

GROUPS: dict[str, tuple[str, ...]] = {
    "all": tuple(MODULE_PATHS),
    "attention": ATTENTION_MODULES,
    "mlp": MLP_MODULES,
    "qv": ("q_proj", "v_proj"),
}
# What vLLM can be told to make room for (`--max-lora-rank`); PEFT has no bound.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def resolve_sites(
    facts: ModelFacts, targets: str | Sequence[str], layers: str | Sequence[int] | None
) -> tuple[str, ...]:
    """The names of all adapted matrices, in forward order.

    targets: group names, module names, or regular expressions over full names. layers: `8-15`, numbers, None for all.
    Raises PlanError: plan-target-unmatched, plan-target-pattern, plan-layer.
    """
    chosen_layers = _layers(facts, layers)
    candidates = [site_name(layer, module) for layer in chosen_layers for module in MODULE_PATHS]
    wanted: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        wanted |= _matches(target, candidates, facts)
    return tuple(site for site in candidates if site in wanted)


def check_rank(facts: ModelFacts, sites: Sequence[str], rank: int) -> None:
    """Refuse a rank that a matrix cannot have, or that no server could load.

    Raises PlanError: plan-rank-too-large, plan-rank-unservable.
    """
    narrowest = min(sites, key=lambda site: min(facts.linear_shape(parse_site(site)[1])))
    out, into = facts.linear_shape(parse_site(narrowest)[1])
    if rank > min(out, into):
        raise PlanError(
            "plan-rank-too-large",
            f"lora.rank {rank} is larger than a side of {narrowest}, which is {out} x {into}",
            hint=f"set lora.rank to at most {min(out, into)}, or leave such matrices out of lora.targets",
        )
    if rank > VLLM_RANKS[-1]:
        raise PlanError(
            "plan-rank-unservable",
            f"an adapter of rank {rank} could not be served: vLLM loads ranks up to {VLLM_RANKS[-1]}",
            got=str(rank),
            hint=f"set lora.rank to at most {VLLM_RANKS[-1]}",
        )


def serving_rank(rank: int) -> int:
    """The smallest `--max-lora-rank` with which vLLM loads this rank."""
    return next(bound for bound in VLLM_RANKS if bound >= rank)


def _matches(target: str, candidates: Sequence[str], facts: ModelFacts) -> set[str]:
    if target in GROUPS or target in MODULE_PATHS:
        modules = GROUPS.get(target, (target,))
        return {site for site in candidates if parse_site(site)[1] in modules}
    if target.isidentifier():
        raise _unmatched(target, candidates, facts)
    try:
        pattern = re.compile(target)
    except re.error as error:
        raise PlanError(
            "plan-target-pattern",
            f"lora.targets: {target!r} is no regular expression: {error}",
            hint="test it on a name such as layers.0.self_attn.q_proj",
        ) from error
    found = {site for site in candidates if pattern.fullmatch(site)}
    if not found:
        raise _unmatched(target, candidates, facts)
    return found


def _unmatched(target: str, candidates: Sequence[str], facts: ModelFacts) -> PlanError:
    words = [*GROUPS, *MODULE_PATHS]
    near = difflib.get_close_matches(target, words, n=1, cutoff=0.6)
    first, last = candidates[0], candidates[-1]
    hint = f"did you mean {near[0]}? " if near else ""
    return PlanError(
        "plan-target-unmatched",
        f"lora.targets: {target!r} matches no matrix of the base ({facts.layers} layers)",
        hint=f"{hint}groups: {', '.join(GROUPS)}; modules: {', '.join(MODULE_PATHS)}; full names: {first} … {last}",
    )


def _layers(facts: ModelFacts, layers: str | Sequence[int] | None) -> list[int]:
    if layers is None:
        return list(range(facts.layers))
    chosen: set[int] = set()
    for first, last in _ranges(layers, facts.layers - 1):
        if first > last or last >= facts.layers:
            raise PlanError(
                "plan-layer",
                f"lora.layers: the base has layers 0 to {facts.layers - 1}",
                got=f"{first}-{last}" if first != last else str(first),
                hint=f"for example lora.layers: 0-{facts.layers - 1}, or {facts.layers // 2}- for the upper half",
            )
        chosen |= set(range(first, last + 1))
    return sorted(chosen)


def _ranges(layers: str | Sequence[int], last: int) -> list[tuple[int, int]]:
    """(first, last) pairs; `8-` ends at the last layer."""
    if not isinstance(layers, str):
        return [(layer, layer) for layer in layers]
    pairs = []
    for part in layers.split(","):
        first, dash, end = part.strip().partition("-")
        pairs.append((int(first), int(end) if end else (last if dash else int(first))))
    return pairs
