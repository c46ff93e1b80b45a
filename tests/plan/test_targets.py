"""Every target matches or is refused; ranks are ones that the matrices and the servers can take."""

from __future__ import annotations

import pytest

from tenon.bases.facts import site_name
from tenon.errors import PlanError
from tenon.plan.targets import VLLM_RANKS, check_rank, resolve_sites, serving_rank

from .situations import LLAMA_8B, SMOLLM2_135M


@pytest.mark.parametrize(
    ("targets", "matrices"),
    [
        ("all", 210),
        ("attention", 120),
        ("mlp", 90),
        ("qv", 60),
        ("q_proj", 30),
        (("q_proj", "down_proj"), 60),
        (("qv", "q_proj"), 60),
        (r"layers\.\d+\.self_attn\.[qk]_proj", 60),
        (r"layers\.3\..*", 7),
        ("layers.3.self_attn.q_proj", 1),
        (("mlp", r".*\.q_proj"), 120),
    ],
)
def test_targets(targets: str | tuple[str, ...], matrices: int) -> None:
    assert len(resolve_sites(SMOLLM2_135M, targets, None)) == matrices


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, list(range(30))),
        ("8-15", list(range(8, 16))),
        ("28-", [28, 29]),
        ("0-2, 7", [0, 1, 2, 7]),
        ((5, 3), [3, 5]),
        ("29", [29]),
    ],
)
def test_layers(layers: str | tuple[int, ...] | None, expected: list[int]) -> None:
    assert resolve_sites(SMOLLM2_135M, "q_proj", layers) == tuple(site_name(n, "q_proj") for n in expected)


def test_sites_are_in_forward_order() -> None:
    sites = resolve_sites(SMOLLM2_135M, ("down_proj", "q_proj"), "0-1")
    assert sites == (
        "layers.0.self_attn.q_proj",
        "layers.0.mlp.down_proj",
        "layers.1.self_attn.q_proj",
        "layers.1.mlp.down_proj",
    )


@pytest.mark.parametrize("targets", ["q_prj", "lm_head", r"layers\.99\..*", ("q_proj", "experts"), r"q_proj.*"])
def test_p13_a_target_that_matches_nothing_is_refused_with_the_candidates(targets: str | tuple[str, ...]) -> None:
    with pytest.raises(PlanError) as caught:
        resolve_sites(SMOLLM2_135M, targets, None)
    assert caught.value.code == "plan-target-unmatched"
    for name in ("q_proj", "down_proj", "layers.0.self_attn.q_proj", "layers.29.mlp.down_proj"):
        assert name in caught.value.hint


def test_p13_a_misspelt_module_gets_the_nearest_name() -> None:
    with pytest.raises(PlanError, match="did you mean q_proj"):
        resolve_sites(SMOLLM2_135M, "q_prj", None)


def test_a_pattern_that_is_none() -> None:
    with pytest.raises(PlanError, match="plan-target-pattern"):
        resolve_sites(SMOLLM2_135M, "layers.(3", None)


@pytest.mark.parametrize("layers", ["30", "8-30", "9-3", (31,)])
def test_layers_that_the_base_has_not(layers: str | tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match="plan-layer"):
        resolve_sites(SMOLLM2_135M, "all", layers)


def test_rank_larger_than_a_matrix() -> None:
    sites = resolve_sites(SMOLLM2_135M, "all", None)
    check_rank(SMOLLM2_135M, sites, 192)
    with pytest.raises(PlanError) as caught:
        check_rank(SMOLLM2_135M, sites, 193)
    assert caught.value.code == "plan-rank-too-large"
    assert "layers.0.self_attn.k_proj" in caught.value.what
    assert "192" in caught.value.hint


def test_p19_a_rank_that_vllm_cannot_load_is_refused_at_planning() -> None:
    sites = resolve_sites(LLAMA_8B, "all", None)
    check_rank(LLAMA_8B, sites, 512)
    with pytest.raises(PlanError) as caught:
        check_rank(LLAMA_8B, sites, 513)
    assert caught.value.code == "plan-rank-unservable"
    assert "vLLM" in caught.value.what


@pytest.mark.parametrize(("rank", "bound"), [(1, 1), (2, 8), (16, 16), (17, 32), (257, 320), (512, 512)])
def test_the_rank_that_a_server_must_allow(rank: int, bound: int) -> None:
    assert serving_rank(rank) == bound
    assert bound in VLLM_RANKS
