"""cuDNN's attention over rows that lie end to end, with a backward pass that gives the same bits every time.

    out[t] = sum_s softmax_s(scale q[t] k[s]^T) v[s]      over tokens s <= t of t's own row, the last `window` of them

On Hopper it takes about half the time of the flash attention that torch has, and its fixed order of sums costs 3 to 9%.
It plans once for each shape: rows and lengths are rounded up, so that batches share plans (a plan takes 0.1 s, the
first of a kind about 1 s). What the fixed order costs is memory, which grows with the square of the longest row; heads
are independent, so the backward pass takes as many key/value heads at once as its room holds, and the bits stay.

Without a fixed order this backward is wrong for rows of different lengths (cuDNN 9.19: dq off by more than itself, NaN
in dk), so it is never asked for. Rows of one length have a plan of their own, which is faster by a tenth.

Sources: Dao, 2023 (FlashAttention-2); cuDNN's documentation of scaled dot-product attention. Needs the package
nvidia-cudnn-frontend; where it cannot be used, `missing` and `Groups` have the reason for whoever goes on without.
The plain form is `models.attention.packed_attention`.
Shape legend: T tokens, H query heads, K key/value heads, E head dimension, N rows, S tokens of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from tenon.kernels.gpu_errors import first_line, is_out_of_memory

_INSTALL = "nvidia-cudnn-frontend comes with pip install 'tenonlm[train]', cuDNN with a torch that is built for CUDA"
_CAPABILITY = (9, 0)
_LARGEST_HEAD = 128
_LARGEST_OFFSET = 2**31 - 1
# Rows are no shorter to a plan: shorter ones are not faster.
_LEAST_LONGEST = 128


def frontend() -> Any | None:
    """The package, or None where it is missing or finds no cuDNN: see `missing`."""
    return _found()[0]


@cache
def _found() -> tuple[Any | None, str]:
    """(the package, ""), or (None, why there is none)."""
    try:
        import cudnn  # pyright: ignore[reportMissingImports]

        cudnn.backend_version()
    except (ImportError, OSError, RuntimeError, AssertionError) as error:  # it asserts that there is one cuDNN only
        return None, first_line(error)
    return cudnn, ""


def missing(device: torch.device) -> str:
    """Why a device has no such attention, whatever the rows, and what helps; "" where it has."""
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        return f"it needs a GPU of capability {_dotted(_CAPABILITY)} or later, and this one has {_dotted(capability)}"
    reason = _found()[1]
    return f"{reason}; {_INSTALL}" if reason else ""


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def fits(q_THE: Tensor) -> bool:
    """Whether there are kernels for such queries: half precision, heads of up to 128 in steps of 8, Hopper or later.

    Whether they can be used here, and for how many heads at once, is for `groups_within` to say.
    """
    tokens, _, size = q_THE.shape
    suits = q_THE.is_cuda and q_THE.dtype in (torch.bfloat16, torch.float16) and size % 8 == 0 and size <= _LARGEST_HEAD
    if not suits or not tokens or tokens * q_THE.stride(0) > _LARGEST_OFFSET:
        return False
    return torch.cuda.get_device_capability(q_THE.device) >= _CAPABILITY


@dataclass(frozen=True, slots=True)
class Shape:
    """What a plan is made for. rows, longest, tokens: rounded up unless equal. q_step, kv_step: elements from one
    token's q, and k or v, to the next one's. window: 0 for none.
    """

    heads: int
    kv_heads: int
    size: int
    rows: int
    longest: int
    tokens: int
    q_step: int
    kv_step: int
    equal: bool
    scale: float
    window: int
    dtype: torch.dtype
    device: torch.device


def shape_of(q_THE: Tensor, k_TKE: Tensor, rows: int, longest: int, *, scale: float, window: int) -> Shape:
    """The shape of a batch, rounded so that others share it. rows: how many. longest: no row has more tokens."""
    equal = rows * longest == q_THE.shape[0]
    return Shape(
        heads=q_THE.shape[1],
        kv_heads=k_TKE.shape[1],
        size=q_THE.shape[2],
        rows=rows if equal else rounded_up(rows),
        longest=longest if equal else rounded_up(max(longest, _LEAST_LONGEST)),
        tokens=q_THE.shape[0] if equal else rounded_up(q_THE.shape[0]),
        q_step=q_THE.stride(0),
        kv_step=k_TKE.stride(0),
        equal=equal,
        scale=scale,
        window=window if 0 < window < longest else 0,
        dtype=q_THE.dtype,
        device=q_THE.device,
    )


def rounded_up(count: int) -> int:
    """The next number of three leading bits: at most a quarter more."""
    unit = 1 << max(0, count.bit_length() - 3)
    return -(-count // unit) * unit


@dataclass(frozen=True, slots=True)
class Offsets:
    """Where the rows of a batch begin, as cuDNN reads it: int32 (N + 1) counts of elements, and (N) tokens of each row.

    Empty where rows are of one length.
    """

    steps: Mapping[str, Tensor]
    lengths: Tensor | None


def offsets_of(bounds_N: Tensor, shape: Shape) -> Offsets:
    """The offsets of a batch whose rows have these int32 bounds; missing rows are empty ones at the end."""
    if shape.equal:
        return Offsets({}, None)
    bounds = bounds_N
    more = shape.rows + 1 - bounds.shape[0]
    if more:
        bounds = torch.cat([bounds, bounds[-1:].expand(more)])
    width, kv_width = shape.heads * shape.size, shape.kv_heads * shape.size
    steps = {"q": shape.q_step, "k": shape.kv_step, "out": width, "d_kv": kv_width, "stats": shape.heads}
    return Offsets({name: bounds * step for name, step in steps.items()}, bounds.diff())


def forward(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, shape: Shape, offsets: Offsets) -> tuple[Tensor, Tensor]:
    """(out (T, H, E), logsumexp of the scores (T, H, 1) fp32). Raises RuntimeError where cuDNN has no such kernel."""
    out_THE = q_THE.new_empty(q_THE.shape)
    stats_TH1 = q_THE.new_empty((*q_THE.shape[:2], 1), dtype=torch.float32)
    _forward_plan(shape).run({"q": q_THE, "k": k_TKE, "v": v_TKE, "out": out_THE, "stats": stats_TH1}, offsets)
    return out_THE, stats_TH1


def backward(
    d_out_THE: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    out_THE: Tensor,
    stats_TH1: Tensor,
    shape: Shape,
    offsets: Offsets,
    *,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v. groups: key/value heads at once, a divisor of K; see `groups_within`."""
    q_THE, k_TKE, v_TKE = inputs
    dq_THE = torch.empty_like(out_THE)
    dk_TKE, dv_TKE = k_TKE.new_empty(k_TKE.shape), v_TKE.new_empty(v_TKE.shape)
    plan, queries = _backward_plan(shape, groups), groups * shape.heads // shape.kv_heads
    for at in range(shape.kv_heads // groups):
        own, kv = slice(at * queries, (at + 1) * queries), slice(at * groups, (at + 1) * groups)
        tensors = {
            "q": q_THE[:, own],
            "k": k_TKE[:, kv],
            "v": v_TKE[:, kv],
            "out": out_THE[:, own],
            "d_out": d_out_THE[:, own],
            "stats": stats_TH1[:, own],
            "dq": dq_THE[:, own],
            "dk": dk_TKE[:, kv],
            "dv": dv_TKE[:, kv],
        }
        plan.run(tensors, offsets)
    return dq_THE, dk_TKE, dv_TKE


@dataclass(frozen=True, slots=True)
class Groups:
    """Key/value heads that a backward pass takes at once; 0 for not at all. problem: why cuDNN cannot be used then, and
    what helps; "" where there is no room for one head.
    """

    count: int
    problem: str = ""


@lru_cache(maxsize=1024)
def groups_within(shape: Shape, room_bytes: int) -> Groups:
    """The most key/value heads at once whose backward takes at most so much memory beside its results.

    Raises RuntimeError when there is no memory left to find that out.
    """
    cudnn, reason = _found()
    if cudnn is None:
        return Groups(0, f"{reason}; {_INSTALL}")
    divisors = [g for g in range(shape.kv_heads, 0, -1) if shape.kv_heads % g == 0]
    try:
        _forward_plan(shape)
        return Groups(next((g for g in divisors if _backward_plan(shape, g).workspace_bytes <= room_bytes), 0))
    except (cudnn.cudnnGraphNotSupportedError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        versions = f"nvidia-cudnn-frontend {cudnn.__version__}, cuDNN {cudnn.backend_version_string()}"
        return Groups(0, f"{first_line(error)} ({versions}); {_INSTALL}")


class _Plan:
    """A graph of one operation, built: where its tensors go, and what it needs beside them."""

    def __init__(self, graph: Any, tensors: Mapping[str, Any], rows: Mapping[str, Any], device: torch.device) -> None:
        """tensors, rows: what is given and made by name, and the rows' offsets and lengths."""
        cudnn = _frontend()
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        self._graph, self._tensors, self._rows, self._device = graph, tensors, rows, device
        self.workspace_bytes = int(graph.get_workspace_size())

    def run(self, tensors: Mapping[str, Tensor], offsets: Offsets) -> None:
        """On torch's current stream."""
        handle = _handle(self._device)
        _frontend().set_stream(handle=handle, stream=torch.cuda.current_stream(self._device).cuda_stream)
        given = {self._tensors[name]: tensor.data_ptr() for name, tensor in tensors.items()}
        given |= {self._rows[name]: step_N.data_ptr() for name, step_N in offsets.steps.items() if name in self._rows}
        if offsets.lengths is not None:
            given[self._rows["lengths"]] = offsets.lengths.data_ptr()
        workspace = torch.empty(max(1, self.workspace_bytes), dtype=torch.uint8, device=self._device)
        self._graph.execute(given, workspace.data_ptr(), handle=handle)


@lru_cache(maxsize=256)
def _forward_plan(shape: Shape) -> _Plan:
    build = _Builder(shape)
    q, k, v = build.inputs(shape.heads, shape.kv_heads)
    out, stats = build.graph.sdpa(q=q, k=k, v=v, generate_stats=True, name="attention", **build.mask())
    build.output(out, "out", shape.heads, shape.heads * shape.size)
    stats.set_output(True).set_data_type(_frontend().data_type.FLOAT)
    stats.set_dim([shape.rows, shape.heads, shape.longest, 1]).set_stride(build.stats_stride())
    if not shape.equal:
        stats.set_ragged_offset(build.rows["stats"])
    return _Plan(build.graph, {"q": q, "k": k, "v": v, "out": out, "stats": stats}, build.rows, shape.device)


@lru_cache(maxsize=256)
def _backward_plan(shape: Shape, groups: int) -> _Plan:
    """groups: key/value heads of one call; the tensors' strides are those of all."""
    build, queries = _Builder(shape), groups * shape.heads // shape.kv_heads
    width, kv_width = shape.heads * shape.size, shape.kv_heads * shape.size
    q, k, v = build.inputs(queries, groups)
    out, d_out = (build.tensor(name, "out", queries, width) for name in ("out", "d_out"))
    stats = build.tensor("stats", "stats", queries, shape.heads, size=1, dtype=_frontend().data_type.FLOAT)
    most = {} if shape.equal else {"max_total_seq_len_q": shape.tokens, "max_total_seq_len_kv": shape.tokens}
    dq, dk, dv = build.graph.sdpa_backward(
        q=q,
        k=k,
        v=v,
        o=out,
        dO=d_out,
        stats=stats,
        use_deterministic_algorithm=True,
        name="attention_backward",
        **build.mask(),
        **most,
    )
    build.output(dq, "out", queries, width)
    build.output(dk, "d_kv", groups, kv_width)
    build.output(dv, "d_kv", groups, kv_width)
    named = {"q": q, "k": k, "v": v, "out": out, "d_out": d_out, "stats": stats, "dq": dq, "dk": dk, "dv": dv}
    return _Plan(build.graph, named, build.rows, shape.device)


class _Builder:
    """A graph whose tensors are (N, heads, S, E) views of tokens that lie end to end."""

    def __init__(self, shape: Shape) -> None:
        cudnn = _frontend()
        kinds = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}
        self._shape, self._dtype = shape, kinds[shape.dtype]
        self.graph = cudnn.pygraph(
            io_data_type=self._dtype,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=_handle(shape.device),
        )
        self.rows: dict[str, Any] = {}
        if not shape.equal:
            self.rows = {name: self._integers(name, shape.rows + 1) for name in ("q", "k", "out", "d_kv", "stats")}
            self.rows["lengths"] = self._integers("lengths", shape.rows)

    def inputs(self, queries: int, keys: int) -> tuple[Any, Any, Any]:
        """q, k and v."""
        shape = self._shape
        k, v = (self.tensor(name, "k", keys, shape.kv_step) for name in ("k", "v"))
        return self.tensor("q", "q", queries, shape.q_step), k, v

    def tensor(
        self, name: str, rows: str, heads: int, step: int, *, size: int | None = None, dtype: Any | None = None
    ) -> Any:
        """An input. rows: whose offsets. step: elements from one token to the next."""
        dims, strides = self._layout(heads, step, self._shape.size if size is None else size)
        ragged = {} if self._shape.equal else {"ragged_offset": self.rows[rows]}
        return self.graph.tensor(name=name, dim=dims, stride=strides, data_type=dtype or self._dtype, **ragged)

    def output(self, tensor: Any, rows: str, heads: int, step: int) -> None:
        """Say how a result lies."""
        dims, strides = self._layout(heads, step, self._shape.size)
        tensor.set_output(True).set_dim(dims).set_stride(strides)
        if not self._shape.equal:
            tensor.set_ragged_offset(self.rows[rows])

    def stats_stride(self) -> list[int]:
        """Of the logsumexps, (T, H) as they lie."""
        return self._layout(self._shape.heads, self._shape.heads, 1)[1]

    def mask(self) -> dict[str, Any]:
        """Which tokens see which, and the scale."""
        shape = self._shape
        words: dict[str, Any] = {
            "attn_scale": shape.scale,
            "diagonal_alignment": _frontend().diagonal_alignment.TOP_LEFT,
            "diagonal_band_right_bound": 0,
        }
        if shape.window:
            words["diagonal_band_left_bound"] = shape.window
        if not shape.equal:
            lengths = self.rows["lengths"]
            words |= {"use_padding_mask": True, "seq_len_q": lengths, "seq_len_kv": lengths}
        return words

    def _layout(self, heads: int, step: int, size: int) -> tuple[list[int], list[int]]:
        shape = self._shape
        return [shape.rows, heads, shape.longest, size], [shape.longest * step, size, step, 1]

    def _integers(self, name: str, count: int) -> Any:
        kind = _frontend().data_type.INT32
        return self.graph.tensor(name=name, dim=[count, 1, 1, 1], stride=[1, 1, 1, 1], data_type=kind)


def _frontend() -> Any:
    cudnn = frontend()
    assert cudnn is not None
    return cudnn


@cache
def _handle(device: torch.device) -> Any:
    with torch.cuda.device(device):
        return _frontend().create_handle()
