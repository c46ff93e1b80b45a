"""Small batches as CUDA graphs: what a step launches is recorded once for each shape and then replayed.

A step of a thousand tokens on a small base computes for a few milliseconds and takes several times as long to launch:
Python and the driver put one kernel after another. A graph holds the launches with their addresses, so every tensor
that differs from batch to batch has a fixed place, into which the batch is copied. For batches to share shapes they are
padded to buckets (`PackOptions.bucket`): rows of no slot, tokens without a label.

The first batch of a shape runs as usual, and compiles what is missing; the second is recorded. A replay launches the
same kernels on the same numbers, so the gradient has the same bits either way.
This module does not know what is computed. One object serves one decoder and one bank, whose slots stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tenon.batch import Batch
from tenon.kernels.gpu_errors import first_line
from tenon.models.decoder import Decoder

# A batch is worth a graph while its tokens times the weights of one layer are below this: then launching a layer's
# kernels (about 0.5 ms) takes longer than running them on the fastest GPUs.
_LAUNCH_BOUND = 1.3e11
# A batch of a graph is never so large: from here on products are chosen by the lengths of its parts.
MOST_TOKENS = 2048
_MOST_GRAPHS = 64

Work = Callable[[Batch, Tensor], Tensor]


def is_launch_bound(decoder: Decoder, tokens: int) -> bool:
    """Whether a batch of so many tokens is to be padded to a bucket and run as a graph."""
    weights = decoder.facts.linear_parameters / decoder.facts.layers
    on_gpu = decoder.fuse and decoder.device.type == "cuda" and decoder.attends_packed and decoder.walk.resident
    return on_gpu and tokens < MOST_TOKENS and tokens * weights < _LAUNCH_BOUND


@dataclass(frozen=True, slots=True)
class _Graph:
    """A recorded batch: its places, and the result's. tables: rotary tables whose addresses the graph holds."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    coefficient_T: Tensor
    result: Tensor
    tables: tuple[Tensor, Tensor]


class StepGraphs:
    """The graphs of one run, by shape."""

    def __init__(self, decoder: Decoder, *, on_failure: Callable[[str], object]) -> None:
        """on_failure: told once, with the reason, when graphs cannot be recorded here; batches then run as usual."""
        self._decoder, self._on_failure = decoder, on_failure
        self._graphs: dict[Hashable, _Graph] = {}
        self._seen: set[Hashable] = set()
        self._pool = torch.cuda.graph_pool_handle() if decoder.device.type == "cuda" else None
        self._works = True

    def run(self, batch: Batch, coefficient_T: Tensor, work: Work) -> Tensor:
        """work(batch, coefficient_T), from a graph where there is one."""
        packed = batch.attention.packed
        if not self._works or packed is None or batch.routes is None:
            return work(batch, coefficient_T)
        key = _shape(batch)
        if key not in self._graphs and (key not in self._seen or len(self._graphs) >= _MOST_GRAPHS):
            self._seen.add(key)
            return work(batch, coefficient_T)
        if key not in self._graphs and not self._record(key, batch, coefficient_T, work):
            return work(batch, coefficient_T)
        found = self._graphs[key]
        _copy(found, batch, coefficient_T)
        found.graph.replay()
        return found.result

    def forget(self) -> None:
        """Let go of all graphs and their memory."""
        self._graphs.clear()
        self._seen.clear()

    def _record(self, key: Hashable, batch: Batch, coefficient_T: Tensor, work: Work) -> bool:
        own, own_coefficient_T = _own_places(batch), coefficient_T.clone()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                result = work(own, own_coefficient_T)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._works = False
            self.forget()
            self._on_failure(first_line(error))
            return False
        self._graphs[key] = _Graph(graph, own, own_coefficient_T, result, self._decoder.rotary_tables)
        return True


def _shape(batch: Batch) -> Hashable:
    """What two batches must share to share a graph."""
    packed, routes = batch.attention.packed, batch.routes
    assert packed is not None and routes is not None
    return (
        batch.tokens,
        len(batch.supervised_L),
        len(packed.cu_seqlens_N),
        packed.longest,
        packed.equal,
        tuple(segment.slot for segment in batch.segments),
        len(routes.tiles_N3),
        len(routes.chunks_C3),
        routes.whole,
        batch.draw_T is not None,
    )


def _own_places(batch: Batch) -> Batch:
    """The batch with tensors of its own."""
    packed, routes = batch.attention.packed, batch.routes
    assert packed is not None and routes is not None
    own_rows = replace(packed, cu_seqlens_N=packed.cu_seqlens_N.clone())
    own_routes = replace(
        routes,
        tiles_N3=routes.tiles_N3.clone(),
        chunks_C3=routes.chunks_C3.clone(),
        segments_M3=routes.segments_M3.clone(),
    )
    return replace(
        batch,
        ids_T=batch.ids_T.clone(),
        positions_T=batch.positions_T.clone(),
        labels_T=batch.labels_T.clone(),
        supervised_L=batch.supervised_L.clone(),
        attention=replace(batch.attention, packed=own_rows),
        routes=own_routes,
        draw_T=None if batch.draw_T is None else batch.draw_T.clone(),
    )


def _tensors(batch: Batch) -> list[Tensor]:
    packed, routes = batch.attention.packed, batch.routes
    assert packed is not None and routes is not None
    tensors = [batch.ids_T, batch.positions_T, batch.labels_T, batch.supervised_L]
    tensors += [routes.tiles_N3, routes.chunks_C3, routes.segments_M3, packed.cu_seqlens_N]
    return tensors if batch.draw_T is None else [*tensors, batch.draw_T]


def _copy(graph: _Graph, batch: Batch, coefficient_T: Tensor) -> None:
    for place, given in zip(_tensors(graph.batch), _tensors(batch), strict=True):
        place.copy_(given)
    graph.coefficient_T.copy_(coefficient_T)
