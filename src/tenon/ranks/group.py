"""What the processes of a run say to each other: `Alone` for one process, `Group` for several of one machine.

Every rank holds the state of the whole run and takes the same steps on it; they share the work in between. Ranks agree
over gloo, in the host's memory, whatever they compute on; tensors move by the device's own means (NCCL on GPUs). A rank
that is gone ends the others: gloo notices at once, and `ranks.watch` does where a rank waits for its device.

This module does not know what is trained, nor how the processes are started.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from tenon.errors import TenonError, TrainError, error_of
from tenon.ranks.watch import RankWatch

# Something that JSON can hold.
Told: TypeAlias = Any

# How long ranks wait for each other where each may still be at work of its own: hung ones end then, dead ones at once.
AGREE_PATIENCE = timedelta(hours=1)
# How long a movement of tensors may take. Ranks agree just before, so all of them are there.
MOVE_PATIENCE = timedelta(minutes=10)
_POLL_SECONDS = 0.05
# torch 2.13 gave it another name.
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor


class Arrival(Protocol):
    """Something on its way."""

    def wait(self) -> object:
        """Return when what is computed next on the device will find it there."""
        ...


class Ranks(Protocol):
    """The processes of a run, as one of them sees them. number: which one this is. count: how many there are."""

    @property
    def number(self) -> int: ...

    @property
    def count(self) -> int: ...

    @property
    def first(self) -> bool:
        """Whether this is the one that writes: events, checkpoints, results."""
        ...

    def largest(self, *values: float) -> tuple[float, ...]:
        """The largest of each value over all ranks. Every rank has to ask, for as many."""
        ...

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks, bit for bit the same on each."""
        ...

    def gather(self, whole_N: Tensor, own_N: Tensor) -> Arrival:
        """Begin to fill `whole_N` with the equal parts of all ranks, in their order."""
        ...

    def first_finds(self, find: Callable[[], Told], *, meanwhile: Callable[[], object] = lambda: None) -> Told:
        """What `find` gives on the first rank, told to all; None on the others when it raised there.

        meanwhile: what the others do before they wait.
        """
        ...

    def first_goes_first(self) -> AbstractContextManager[None]:
        """A block that the other ranks enter when the first one has left it."""
        ...

    def part(self, error: TenonError) -> None:
        """Before this rank ends with an error: leave word of it for those that will miss it.

        Ranks but the first then wait a little until the first has ended: it has more to say, and it is stopped when
        another ends before it.
        """
        ...

    def leave(self) -> None:
        """End the company, when all have come so far; from then on each is alone."""
        ...

    def close(self) -> None:
        """This rank ends, whatever the others do: call it last."""
        ...


class Alone:
    """One process: nothing to agree on."""

    number = 0
    count = 1
    first = True

    def largest(self, *values: float) -> tuple[float, ...]:
        """The values."""
        return values

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """They are their sums."""

    def gather(self, whole_N: Tensor, own_N: Tensor) -> Arrival:
        """The part is the whole."""
        whole_N.copy_(own_N)
        return _HERE

    def first_finds(self, find: Callable[[], Told], *, meanwhile: Callable[[], object] = lambda: None) -> Told:  # noqa: ARG002
        """What it finds."""
        return find()

    def first_goes_first(self) -> AbstractContextManager[None]:
        """Nobody waits."""
        return nullcontext()

    def part(self, error: TenonError) -> None:
        """Nobody listens."""

    def leave(self) -> None:
        """Nobody is left."""

    def close(self) -> None:
        """Nothing is open."""


class Group:
    """One of several processes. Use `join`."""

    def __init__(self, store: Store, number: int, count: int, *, movers: dist.ProcessGroup, watch: RankWatch):
        self.number, self.count, self.first = number, count, number == 0
        self._store, self._movers, self._watch = store, movers, watch
        # What the first rank told since all agreed last: a rank that was stopped half way skips some of it, alone.
        self._agreed, self._told = 0, 0

    def largest(self, *values: float) -> tuple[float, ...]:
        """See `Ranks.largest`. Raises TrainError train-rank-lost, or what the lost rank said."""
        if self.count == 1:
            return values
        all_V = torch.tensor(values, dtype=torch.float64)
        with self._company():
            dist.all_reduce(all_V, dist.ReduceOp.MAX)
        self._agreed, self._told = self._agreed + 1, 0
        return tuple(all_V.tolist())

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """See `Ranks.add_up`. Raises as `largest`; on a GPU a lost rank shows when the sums are used."""
        if self.count == 1:
            return
        with self._company():
            groups = [self._movers if tensor.is_cuda else None for tensor in tensors]
            arrivals = [
                dist.all_reduce(tensor, group=group, async_op=True)
                for tensor, group in zip(tensors, groups, strict=True)
            ]
            for arrival in arrivals:
                assert arrival is not None
                arrival.wait()

    def gather(self, whole_N: Tensor, own_N: Tensor) -> Arrival:
        """See `Ranks.gather`. Raises as `largest`."""
        with self._company():
            arrival = _all_gather(whole_N, own_N, group=self._movers, async_op=True)
        assert arrival is not None
        return _Coming(arrival, self._company)

    def first_finds(self, find: Callable[[], Told], *, meanwhile: Callable[[], object] = lambda: None) -> Told:
        """See `Ranks.first_finds`. However long the first rank takes, the others wait, and hear signals meanwhile."""
        self._told += 1
        if self.count == 1:
            return find()
        key = f"found-{self._agreed}-{self._told}"
        if not self.first:
            meanwhile()
            return json.loads(self._read(key))
        found: Told = None
        try:
            found = find()
        finally:
            # Told even when it was stopped: the others must not wait for what never comes.
            with self._company():
                self._store.set(key, json.dumps(found))
        return found

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """See `Ranks.first_goes_first`; patient as `first_finds`."""
        if not self.first:
            self.first_finds(lambda: None)
        try:
            yield
        finally:
            if self.first:
                self.first_finds(lambda: None)

    def part(self, error: TenonError) -> None:
        """See `Ranks.part`."""
        if self.count == 1:
            return
        if error.code != "train-rank-lost" and not error.code.endswith("-stopped"):
            word = {"rank": self.number, "code": error.code, "what": error.what, "got": error.got, "hint": error.hint}
            with suppress(RuntimeError):  # nobody is left to read it
                self._store.set("why", json.dumps(word))
        if not self.first:
            self._watch.outlive_first()

    def leave(self) -> None:
        """See `Ranks.leave`."""
        if self.count > 1:
            self.largest(0.0)
            self._watch.stop()
            dist.destroy_process_group()
            self.count = 1

    def close(self) -> None:
        """See `Ranks.close`. A thread that still runs when Python shuts down may abort the process."""
        self._watch.stop()

    def _read(self, key: str) -> bytes:
        while True:
            with self._company():
                if self._store.check([key]):
                    return self._store.get(key)
            time.sleep(_POLL_SECONDS)

    @contextmanager
    def _company(self) -> Iterator[None]:
        """What torch raises when another rank is gone leaves as a TenonError."""
        try:
            yield
        except RuntimeError as error:  # all of torch.distributed's exceptions derive from it
            raise self._why(error) from error

    def _why(self, error: RuntimeError) -> TenonError:
        try:
            word = json.loads(self._store.get("why")) if self._store.check(["why"]) else None
        except RuntimeError:
            word = None
        if word is None or word["rank"] == self.number:
            return rank_lost("another rank of this run is gone", got=_first_sentence(error))
        what = f"rank {word['rank']}: {word['what']}"
        return error_of(word["code"], what, got=word["got"], hint=word["hint"])


class _Coming:
    """An arrival whose failure is a rank's loss."""

    def __init__(self, work: dist.Work, company: Callable[[], AbstractContextManager[None]]) -> None:
        self._work, self._company = work, company

    def wait(self) -> None:
        with self._company():
            self._work.wait()


class _Here:
    def wait(self) -> None:
        """It is here."""


_HERE = _Here()
ALONE: Ranks = Alone()


def join(
    store: Store,
    number: int,
    count: int,
    *,
    device: torch.device,
    on_lost: Callable[[TenonError], None],
    grace_seconds: float = 10.0,
) -> Group:
    """Meet the other ranks at a store. Returns when all are there.

    device: what this rank computes on. on_lost: called from another thread when a rank is gone and this one has not
    left by itself within grace_seconds; it has to end the process. Raises TrainError train-rank-lost when not all came.
    """
    try:
        dist.init_process_group(
            "gloo", store=PrefixStore("ranks", store), rank=number, world_size=count, timeout=AGREE_PATIENCE
        )
        movers = dist.group.WORLD
        if device.type == "cuda":
            torch.cuda.set_device(device)
            movers = dist.new_group(backend="nccl", timeout=MOVE_PATIENCE)
        assert isinstance(movers, dist.ProcessGroup)
    except RuntimeError as error:
        raise rank_lost("the ranks of this run did not find each other", got=_first_sentence(error)) from error
    watch = RankWatch(
        store, number, count, on_lost=lambda who: on_lost(rank_lost(f"{who} is gone")), grace_seconds=grace_seconds
    )
    return Group(PrefixStore("tenon", store), number, count, movers=movers, watch=watch)


def _first_sentence(error: RuntimeError) -> str:
    """What torch says first, without the place in its own source."""
    words = re.sub(r"^\[[^\]]*\] ", "", str(error).strip())
    return re.split(r"\. |\n", words, maxsplit=1)[0][:200] or type(error).__name__


def rank_device(kind: str, ranks: Ranks) -> torch.device:
    """What a rank computes on: a GPU of its own, or the one CPU."""
    return torch.device(kind, ranks.number) if kind == "cuda" and ranks.count > 1 else torch.device(kind)


def rank_lost(what: str, *, got: str = "") -> TrainError:
    """The error of a run one of whose processes ended under the others."""
    return TrainError(
        "train-rank-lost",
        what,
        got=got,
        hint="checkpoints are kept: tenon resume RUN; its log says more where it could: RUN/worker.log",
    )
