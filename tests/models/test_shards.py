"""A base spread over ranks computes bit for bit what a whole one does, whatever each rank has to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import Any

import pytest
import torch

from tenon.adapters.bank import AdapterBank
from tenon.bases.facts import ModelFacts
from tenon.data.pack import PackOptions, pack_rows
from tenon.models.decoder import Decoder
from tenon.models.frozen import FrozenKind
from tenon.models.layer import Layer
from tenon.models.shards import ShardedLayers, Sharing
from tenon.ranks.group import ALONE, Ranks
from tests.company import together
from tests.tiny import CPU, random_slot, slot_shape, tiny_decoder, tiny_facts
from tests.train.test_step import gradients, rows_of

WAYS: tuple[tuple[FrozenKind, bool], ...] = (
    ("dense", False), ("fp8", False), ("int8", False), ("nf4", False), ("nf4", True),
)  # fmt: skip


class NoStop:
    """Nobody asks to stop."""

    pending = False

    def now(self) -> None:
        raise AssertionError


class StopWhenAsked:
    """Stops with KeyboardInterrupt from the time that `pending` is set."""

    pending = False

    def now(self) -> None:
        raise KeyboardInterrupt


def facts_of() -> ModelFacts:
    """Norms of queries and keys, and biases, so that a layer has every kind of tensor."""
    return tiny_facts(layers=5, qk_norm=True, tied=False).model_copy(update={"qkv_bias": True, "mlp_bias": True})


def spread(kind: FrozenKind, compute_fp8: bool, sharing: Sharing | None) -> Decoder:
    """The weights of a tiny decoder, kept in a format, here or spread."""
    facts = facts_of()
    decoder = Decoder(facts, dtype=torch.float32, device=CPU, kind=kind, compute_fp8=compute_fp8, sharing=sharing)
    decoder.load_tensors(tiny_decoder(facts).named_tensors().items())
    return decoder


def window_of(rank: int, batches: int) -> list[Any]:
    return pack_rows(rows_of(0, 2 * batches, seed=7 + rank), PackOptions(40, False), CPU)


def passes(decoder: Decoder, windows: Sequence[list[Any]]) -> list[torch.Tensor]:
    """Hidden states of a forward pass, then of recorded ones with their slots' gradients. Windows differ by rank."""
    bank = AdapterBank(decoder.facts, dtype=torch.float32, device=CPU)
    random_slot(bank, slot_shape(decoder.facts, rank=2), 0)
    found = []
    for batches in windows:
        for batch in batches:
            recording = decoder.record(batch, bank)
            found.append(recording.hidden_TD.clone())
            recording.backward(torch.ones_like(recording.hidden_TD))
        decoder.walk.follow()
        found.append(gradients(bank)[0])
    return found


def windows_of(rank: int) -> list[list[Any]]:
    """Rank 0 has more batches than the others, then fewer, then none."""
    counts = [[3, 1, 0], [1, 2, 2], [0, 3, 1]][rank]
    return [window_of(rank, count) for count in counts]


def spread_passes(ranks: Ranks) -> dict[str, Any]:
    """Everything that the tests ask of three ranks: each compares with a whole base of its own."""
    found: dict[str, Any] = {}
    for kind, compute_fp8 in WAYS:
        decoder = spread(kind, compute_fp8, Sharing(ranks, NoStop()))
        got = passes(decoder, windows_of(ranks.number))
        found[f"{kind} {compute_fp8}"] = equal(got, whole_passes(ranks, kind, compute_fp8))
        assert isinstance(decoder.walk, ShardedLayers)
        found[f"{kind} {compute_fp8} bytes"] = decoder.walk.size_bytes
    decoder, batches = spread("dense", False, Sharing(ranks, NoStop())), window_of(0, 2)
    if ranks.first:  # one answers alone
        whole = spread("dense", False, None)
        found["answer"] = equal([decoder.forward(b) for b in batches], [whole.forward(b) for b in batches])
    decoder.walk.follow()
    found["mended"] = equal(mended(ranks), whole_passes(ranks, "dense", False))
    found["stopped"] = stopped(ranks)
    return found


def whole_passes(ranks: Ranks, kind: FrozenKind, compute_fp8: bool) -> list[torch.Tensor]:
    return passes(spread(kind, compute_fp8, None), windows_of(ranks.number))


def equal(got: list[torch.Tensor], expected: list[torch.Tensor]) -> list[bool]:
    return [torch.equal(a, b) for a, b in zip(got, expected, strict=True)]


def mended(ranks: Ranks) -> list[torch.Tensor]:
    """An error half way up, on one rank, and half way down on another; then all again."""
    decoder = spread("dense", False, Sharing(ranks, NoStop()))
    layers = decoder.walk.up() if ranks.number == 1 else decoder.walk.down(1) if ranks.number == 2 else iter(())
    next(layers, None)
    return passes(decoder, windows_of(ranks.number))


def stopped(ranks: Ranks) -> int:
    """All stop at the same pass, however many each still has to make."""
    stop, made = StopWhenAsked(), 0
    decoder = spread("dense", False, Sharing(ranks, stop))
    try:
        for batch in cycle(window_of(0, 1)):
            stop.pending = ranks.number == 1 and made == 3
            decoder.forward(batch)
            made += 1
    except KeyboardInterrupt:
        return made
    return -1


@pytest.fixture(scope="module")
def spread_found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return together(spread_passes, tmp_path_factory.mktemp("shards"), count=3)


@pytest.mark.parametrize(("kind", "compute_fp8"), WAYS)
def test_a_spread_base_computes_what_a_whole_one_does(
    spread_found: list[dict[str, Any]], kind: FrozenKind, compute_fp8: bool
) -> None:
    for found in spread_found:
        same = found[f"{kind} {compute_fp8}"]
        assert len(same) >= 7 and all(same)


def test_a_rank_keeps_a_third_of_the_layers_and_room_for_two(spread_found: list[dict[str, Any]]) -> None:
    whole = spread("dense", False, None)
    layer_bytes = sum(place.get().numel() * 4 for place in whole.walk.places(0).values())
    for found in spread_found:
        # 13 tensors of a layer each begin at a multiple of 256.
        assert 5 * layer_bytes / 3 + 2 * layer_bytes <= found["dense False bytes"]
        assert found["dense False bytes"] <= (layer_bytes + 14 * 256) * (5 / 3 + 2) + 5 * 256


def test_one_rank_answers_while_the_others_follow(spread_found: list[dict[str, Any]]) -> None:
    assert spread_found[0]["answer"] == [True, True]


def test_an_error_half_way_leaves_the_next_pass_whole(spread_found: list[dict[str, Any]]) -> None:
    assert all(all(found["mended"]) for found in spread_found)


def test_a_request_to_stop_ends_all_at_the_same_pass(spread_found: list[dict[str, Any]]) -> None:
    assert [found["stopped"] for found in spread_found] == [3, 3, 3]


class Counted:
    """One rank that counts what it gathers."""

    number, count, first = 0, 1, True

    def __init__(self) -> None:
        self.gathered = 0

    def largest(self, *values: float) -> tuple[float, ...]:
        return values

    def gather(self, whole_N: torch.Tensor, own_N: torch.Tensor) -> object:
        self.gathered += 1
        return ALONE.gather(whole_N, own_N)


def test_layers_still_in_their_rooms_are_not_gathered_again() -> None:
    ranks = Counted()
    decoder = spread("dense", False, Sharing(ranks, NoStop()))  # pyright: ignore[reportArgumentType]

    def walked(layers: Iterator[Layer]) -> int:
        before = ranks.gathered
        for _ in layers:
            pass
        return ranks.gathered - before

    assert walked(decoder.walk.up()) == 5
    assert walked(decoder.walk.down(0)) == 3
    assert walked(decoder.walk.up()) == 3
    assert walked(decoder.walk.down(3)) == 0


def test_a_spread_layer_is_not_read_by_name() -> None:
    decoder = spread("dense", False, Sharing(ALONE, NoStop()))
    with pytest.raises(RuntimeError, match="in passes alone"):
        decoder.named_tensors()
