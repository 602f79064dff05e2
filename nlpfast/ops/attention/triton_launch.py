"""Launches the Triton kernels of attention, on batches and on packed sequences: which one, and how compiled.

What follows from shapes, strides and options is worked out once and looked up afterwards; so is the compiled
kernel, which spares Triton's own look at every argument. Under torch.compile the launches are operations that
the compiler does not look into, so that it hands over tensors with the strides that it was told.

Legend: B batch, H query heads, Hk key heads, L queries, S keys, D head size of query and key, Dv of value.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from nlpfast.ops.attention.triton_backward import _bwd_kernel
from nlpfast.ops.attention.triton_backward_tiled import _bwd_dkdv_kernel, _bwd_dmask_kernel, _bwd_dq_kernel
from nlpfast.ops.attention.triton_configs import CONFIGS, Config
from nlpfast.ops.attention.triton_forward import _fwd_kernel
from nlpfast.ops.launch import MAX_REMEMBERED, Launch, on_device_of

CAUSAL = {"none": 0, "top_left": 1, "bottom_right": 2}

# One program of _bwd_kernel computes all gradients of a head, up to this many queries and keys. With several
# tiles of keys, and for more queries, it does so only where there are heads enough to keep a GPU busy (132
# multiprocessors in an H200): else triton_backward_tiled.py shares a head's tiles among programs.
MAX_OWNED = 512
MIN_OWNED_HEADS = 128

_remembered: dict[tuple[Any, ...], Call] = {}

Strides = tuple[int, ...]


class Call:
    """What the kernels need to know of a call; packed sequences are to them a batch with stride 0."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        key_lengths: Tensor | None,
        prefix_lengths: Tensor | None,
        cu_seq_q: Tensor | None,
        cu_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        seed: Tensor | None,
        dropout_p: float,
        causal: str,
        scale: float,
    ) -> None:
        """Take the arguments of ``attention``'s backends, and those of packed sequences or None."""
        self.packed = cu_seq_q is not None
        self.B = query.shape[0] if cu_seq_q is None else cu_seq_q.shape[0] - 1
        head, row = (1, 0) if self.packed else (1, 2)
        self.H, self.Hk, self.rows = query.shape[head], value.shape[head], query.shape[row]
        self.L, self.S, self.D, self.Dv = max_q, max_k, query.shape[-1], value.shape[-1]
        self.dtype, self.device = query.dtype, query.device
        self.strides = tuple(self.strides_of(x) for x in (query, key, value))
        self.row_strides = (0 if self.packed else self.H * self.rows, self.rows)
        self.mask_kind = 0
        self.mask_shape: Strides = ()
        self.mask_strides: Strides = (0, 0, 0, 0)
        if attn_mask is not None:
            self.mask_kind = 1 if attn_mask.dtype == torch.bool else 2
            self.mask_shape = tuple(attn_mask.shape)
            self.mask_strides = attn_mask.expand(self.B, self.H, self.L, self.S).stride()
        threshold = math.floor(dropout_p * 65536 + 0.5)
        keep_scale = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
        group = self.H // max(self.Hk, 1)
        self.numbers = (self.H, group, self.L, self.S, scale, threshold, keep_scale)
        what = {"CAUSAL": CAUSAL[causal], "MASK": self.mask_kind, "DROPOUT": seed is not None}
        sizes = {"D": self.D, "DV": self.Dv, "BLOCK_D": _block(self.D), "BLOCK_DV": _block(self.Dv)}
        self.features = {**sizes, **what, "PRECISION": "ieee", "enable_fp_fusion": True}
        # Inside of a tile the kernels count in 32 bits.
        self.far = any(256 * (x[2] + x[3]) >= 2**31 for x in (*self.strides, self.mask_strides))
        # The gradient of a mask is computed by tiles, whatever the lengths; what it reads must be kept.
        self.keeps_stats = not self.backward_kind(mask_gradient=self.mask_kind == 2).startswith("whole")
        self.forward: Launch | None = None
        self.backward: dict[tuple[Any, ...], dict[str, Launch]] = {}

    def strides_of(self, x: Tensor) -> Strides:
        """Return the strides of ``x`` as [B, H, rows, D]."""
        return (0, x.stride(1), x.stride(0), x.stride(2)) if self.packed else x.stride()

    def new_rows(self, like: Tensor, width: int) -> Tensor:
        """Return memory for as many rows as ``like`` has, with its heads outside of the rows or inside."""
        if not self.packed and 0 < like.stride(1) < like.stride(2):
            B, H, rows, _ = like.shape
            return like.new_empty(B, rows, H, width).transpose(1, 2)
        return like.new_empty(*like.shape[:-1], width)

    def new_numbers(self, like: Tensor, *shape: int) -> Tensor:
        """Return memory for float32 numbers, ``shape`` for each row of the queries."""
        rows = (self.H, self.rows) if self.packed else (self.B, self.H, self.rows)
        return like.new_empty(*rows, *shape, dtype=torch.float32)

    def line(self, kind: str) -> tuple[str, int, int, bool]:
        """Return the line of CONFIGS for a kernel."""
        width = next(D for D in (32, 64, 128, 256) if max(self.D, self.Dv) <= D)
        return kind, self.dtype.itemsize, width, self.mask_kind != 0

    def config(self, kind: str) -> Config:
        """Return how a kernel is compiled."""
        return CONFIGS[self.line(kind)]

    def forward_kind(self) -> str:
        """Return the kernel of CONFIGS that computes the output."""
        return "fwd_dropout" if self.features["DROPOUT"] and self.line("fwd_dropout") in CONFIGS else "fwd"

    def backward_kind(self, mask_gradient: bool) -> str:
        """Return the kernel that computes the gradients; "dq" stands for those that share out the tiles."""
        many, short = self.B * self.Hk >= MIN_OWNED_HEADS, max(self.L, self.S) <= MAX_OWNED
        for kind, most_keys in (("whole_64", 64), ("whole", 128), ("owned", MAX_OWNED)):
            # With one tile of keys a program reads each query once, however many there are.
            owned = (many and short) if kind == "owned" else (many or short)
            if owned and most_keys >= self.S and self.line(kind) in CONFIGS and not mask_gradient:
                return kind
        return "dq"

    def launch(self, kernel: Any, kind: str, programs: int, *strides: Any, **constants: Any) -> Launch:
        """Return a kernel as CONFIGS has it for its kind."""
        constants = {**self.features, **constants, **self.config(kind)._asdict()}
        return Launch(kernel, self.line(kind), programs, (*strides, *self.numbers), **constants)


def _block(D: int) -> int:
    """Return the power of 2 that holds D columns; matrix products take no fewer than 16."""
    return max(16, triton.next_power_of_2(D))


def run_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward kernel; the arguments are those of ``Call``.

    Returns:
        The output as [B, H, L, Dv] or packed [total, H, Dv]; lse [B, H, L] or [H, total]; and for each of its
        numbers two, the maximum of the row's scores and the inverse of its sum, where backward reads them.
    """
    if torch.compiler.is_compiling():
        return torch.ops.nlpfast.triton_attention_forward(*arguments)
    return _run_forward(*arguments)


def run_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    stats: Tensor | None,
    mask_gradient: bool,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the backward kernels; see ``run_forward``.

    Returns:
        Gradients of query, key and value, and of the mask in float32, empty without ``mask_gradient``.
    """
    run = _run_backward
    if torch.compiler.is_compiling():
        run = torch.ops.nlpfast.triton_attention_backward
    return run(grad_out, grad_lse, out, stats, mask_gradient, *arguments)


def _remember(*arguments: Any) -> tuple[Call, tuple[Any, ...]]:
    """Return the Call of these arguments, made anew only for shapes, strides or options not seen before.

    The arguments are returned too: tensors whose rows lie too far apart are replaced by copies.
    """
    query, key, value, attn_mask, _, _, cu_seq_q, _, max_q, max_k, seed, *options = arguments
    mask = None if attn_mask is None else (attn_mask.shape, attn_mask.stride(), attn_mask.dtype)
    shapes = (query.shape, query.stride(), key.shape, key.stride(), value.shape, value.stride(), mask)
    sequences = None if cu_seq_q is None else len(cu_seq_q)
    what = (*shapes, query.dtype, query.device, sequences, max_q, max_k, seed is None, *options)
    call = _remembered.get(what)
    if call is None:
        if len(_remembered) >= MAX_REMEMBERED:
            _remembered.clear()
        call = _remembered[what] = Call(*arguments)
    if call.far:
        dense = (x if x is None else x.contiguous() for x in arguments[:4])
        return _remember(*dense, *arguments[4:])
    return call, arguments


def _run_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernel."""
    call, arguments = _remember(*arguments)
    query, key, value, mask, lengths, prefix, cu_q, cu_k, _, _, seed, *_ = arguments
    out, lse, stats = _new_forward(call, query)
    if call.forward is None:
        kind = call.forward_kind()
        programs = call.B * call.H * triton.cdiv(call.L, call.config(kind).BLOCK_M)
        strides = (*call.strides, call.mask_strides, call.strides_of(out), call.row_strides)
        call.forward = call.launch(_fwd_kernel, kind, programs, *strides)
    masks = (mask, _dense(lengths), _dense(prefix), _dense(cu_q), _dense(cu_k), _dense(seed))
    with on_device_of(query):
        call.forward(query, key, value, *masks, out, lse, stats if call.keeps_stats else None)
    return out, lse, stats


def _run_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    stats: Tensor | None,
    mask_gradient: bool,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the single backward kernel, or those that share out the tiles."""
    call, arguments = _remember(*arguments)
    query, key, value, mask, lengths, prefix, cu_q, cu_k, _, _, seed, *_ = arguments
    if 256 * (grad_out.stride(0 if call.packed else 2) + grad_out.stride(-1)) >= 2**31:
        grad_out = grad_out.contiguous()
    dq, dk, dv, dmask = _new_backward(call, query, key, value, mask, mask_gradient)
    what = (grad_out.stride(), out.stride(), mask_gradient)
    launches = call.backward.get(what)
    if launches is None:
        strides = [call.strides_of(x) for x in (grad_out, out, dq, dk, dv)]
        launches = call.backward[what] = _backward_launches(call, mask_gradient, *strides)
    masks = (mask, _dense(lengths), _dense(prefix), _dense(cu_q), _dense(cu_k), _dense(seed))
    inputs, grad_lse = (query, key, value), _dense(grad_lse)
    with on_device_of(query):
        if "dq" not in launches:
            ((name, launch),) = launches.items()
            dq_sum = call.new_numbers(query, call.D) if name == "owned" else None
            launch(grad_out, grad_lse, *inputs, out, stats, *masks, dq, dk, dv, dq_sum)
        else:
            shift = call.new_numbers(query)
            launches["dq"](grad_out, grad_lse, *inputs, out, stats, *masks, dq, shift)
            launches["dkdv"](grad_out, *inputs, stats, shift, *masks, dk, dv)
            if mask_gradient:
                launches["dmask"](grad_out, *inputs, stats, shift, *masks[:3], masks[5], dmask)
    return dq, dk, dv, dmask


def _backward_launches(
    call: Call, mask_gradient: bool, grad: Strides, out: Strides, dq: Strides, dk: Strides, dv: Strides
) -> dict[str, Launch]:
    """Return the kernels that compute the gradients, by name."""
    inputs, rest = (grad, *call.strides), (call.mask_strides, call.row_strides)
    kind = call.backward_kind(mask_gradient)
    if kind != "dq":
        name = kind.partition("_")[0]
        strides = (*inputs, out, *rest, dq, dk, dv)
        return {name: call.launch(_bwd_kernel, kind, call.B * call.Hk, *strides, WHOLE=name == "whole")}
    config = call.config("dq")
    programs = call.B * call.H * triton.cdiv(call.L, config.BLOCK_M)
    whole = call.S <= config.BLOCK_N
    launches = {"dq": call.launch(_bwd_dq_kernel, "dq", programs, *inputs, out, *rest, dq, WHOLE=whole)}
    programs = call.B * call.Hk * triton.cdiv(call.S, call.config("dkdv").BLOCK_N)
    launches["dkdv"] = call.launch(_bwd_dkdv_kernel, "dkdv", programs, *inputs, *rest, dk, dv)
    if mask_gradient:
        config, (mask_b, mask_h, mask_l, mask_s) = call.config("dmask"), call.mask_shape
        programs = mask_b * mask_h * triton.cdiv(mask_l, config.BLOCK_M) * triton.cdiv(mask_s, config.BLOCK_N)
        sizes = (*inputs, *rest, call.mask_shape, call.B)
        constants = {"ROWS": mask_l > 1, "COLUMNS": mask_s > 1}
        launches["dmask"] = call.launch(_bwd_dmask_kernel, "dmask", programs, *sizes, **constants)
    return launches


def _new_forward(call: Call, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return memory for the results of the forward kernel."""
    return call.new_rows(query, call.Dv), call.new_numbers(query), call.new_numbers(query, 2)


def _new_backward(
    call: Call, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, mask_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return memory for the gradients."""
    shape = attn_mask.shape if mask_gradient and attn_mask is not None else (0,)
    dq, dk, dv = (call.new_rows(x, x.shape[-1]) for x in (query, key, value))
    return dq, dk, dv, query.new_empty(shape, dtype=torch.float32)


def _dense(x: Tensor | None) -> Tensor | None:
    """Return a vector as the kernels read it, without strides."""
    return None if x is None else x.contiguous()


def _register() -> None:
    """Make operations of the launches, and tell torch.compile the shapes and strides of what they return."""
    shared = (
        "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? key_lengths, "
        "Tensor? prefix_lengths, Tensor? cu_seq_q, Tensor? cu_seq_k, SymInt max_q, SymInt max_k, "
        "Tensor? seed, float dropout_p, str causal, float scale"
    )
    upstream = "Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor stats, bool mask_gradient"
    forward = torch.library.custom_op(
        *("nlpfast::triton_attention_forward", _run_forward),
        mutates_args=(),
        schema=f"({shared}) -> (Tensor, Tensor, Tensor)",
    )
    backward = torch.library.custom_op(
        *("nlpfast::triton_attention_backward", _run_backward),
        mutates_args=(),
        schema=f"({upstream}, {shared}) -> (Tensor, Tensor, Tensor, Tensor)",
    )

    @forward.register_fake
    def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _new_forward(Call(*arguments), arguments[0])

    @backward.register_fake
    def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mask_gradient, query, key, value, attn_mask, *_ = arguments[4:]
        return _new_backward(Call(*arguments[5:]), query, key, value, attn_mask, mask_gradient)


_register()
