"""RMSNorm of queries and keys with 3-D rotary position embedding: ``qk_norm_rope`` and, in place, ``qk_norm_rope_``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stattn.grid import is_int
from stattn.ops import _triton, _validate
from stattn.ops._dispatch import Implementation, Operation, device_of, serves_all
from stattn.reference.qk_norm_rope import qk_norm_rope as reference
from stattn.reference.qk_norm_rope import qk_norm_rope_ as reference_in_place
from stattn.rope import RopeTables


class QKNormRopeCall(NamedTuple):
    """What the choice of an implementation depends on. weights: the dtypes of the weights that are given."""

    device: str
    capability: tuple[int, int]
    dtype: torch.dtype
    heads: int
    head_dim: int
    across_heads: bool
    interleaved: bool
    weights: tuple[torch.dtype, ...]


MOST_FEATURES = 32768  # of all heads of a token, which lie in the registers of one program


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: RopeTables | None,
    *,
    k_rope: RopeTables | None = None,
    across_heads: bool = False,
    eps: float = 1e-6,
    interleaved: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Normalise queries and keys by their root mean square and rotate them by their position.

    q: [B, N, heads, D]; k: [B, N, kv_heads, D] of q's dtype, kv_heads may be fewer; any strides. q_weight, k_weight:
    [D], the mean square being taken over one head; with across_heads [heads*D] and [kv_heads*D], the mean square being
    taken over all heads of a token (Wan, LTX); None for no norm. rope: angles from ``rope_tables``, for N tokens,
    global ones included; None for no rotation. k_rope: the angles of k when its tokens are not q's, for instance a
    cache of unrotated keys: k may then have another N. interleaved: True turns the pairs of features (2i, 2i+1) (Wan,
    HunyuanVideo, CogVideoX), False the pairs (i, i + D/2) ("rotate half", Cosmos). eps: added to the mean square.
    impl: see ``stattn.explain``.

    Returns (q', k') of the inputs' shapes and dtype. Norm and rotation are computed in float32 (float64 when an input
    is) from float32 angles, and rounded once at the end: not between the two, as eager code in 16 bits does.
    Differentiable in q, k and weights, once by Triton; its gradients are bitwise reproducible.
    Raises ValueError or TypeError for wrong shapes, dtypes, devices, an odd D, tables of another grid, or angles of q
    and k that split the features in two ways.
    RMSNorm: arXiv:1910.07467; rotary embedding: arXiv:2104.09864.
    """
    k_rope, eps, call = check(q, k, q_weight, k_weight, rope, k_rope, across_heads, eps, interleaved)
    return QK_NORM_ROPE.choose(impl, call).run(q, k, q_weight, k_weight, rope, k_rope, across_heads, eps, interleaved)


def check(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: RopeTables | None,
    k_rope: RopeTables | None,
    across_heads: bool,
    eps: float,
    interleaved: bool,
) -> tuple[RopeTables | None, float, QKNormRopeCall]:
    """Check the arguments of ``qk_norm_rope``; returns the angles of k, eps and the call's metadata."""
    if k_rope is not None and rope is None:
        raise ValueError("k_rope needs rope: k cannot be rotated alone")
    q = _validate.tensor("q", q, "[B, N, heads, D]")
    k = _validate.tensor("k", k, "[B, N, kv_heads, D]")
    k_rope = rope if k_rope is None else k_rope
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"k of shape {tuple(k.shape)} must share B={q.shape[0]} and D={q.shape[3]} with q")
    if k_rope is rope and k.shape[1] != q.shape[1]:
        raise ValueError(f"k has {k.shape[1]} tokens, q {q.shape[1]}: k needs angles of its own, k_rope")
    _check_pair(q, k, q_weight, k_weight, across_heads, interleaved)
    _check_rope("rope", rope, "q", q)
    _check_rope("k_rope", k_rope, "k", k)
    if rope is not None and k_rope is not None:
        splits = [tuple(2 * each.shape[2] for each in (tables.t, tables.h, tables.w)) for tables in (rope, k_rope)]
        if splits[0] != splits[1]:
            raise ValueError(f"k_rope turns {splits[1]} features with t, h and w, rope {splits[0]}: they must be equal")
    return k_rope, _validate.epsilon(eps), _call(q, k, q_weight, k_weight, across_heads, interleaved)


def qk_norm_rope_(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: RopeTables | None,
    *,
    kv_heads: int | None = None,
    across_heads: bool = False,
    eps: float = 1e-6,
    interleaved: bool = True,
    impl: str = "auto",
) -> Tensor:
    """Normalise and rotate the queries and keys of a fused QKV buffer in place.

    qkv: [B, N, 3, heads, D], the queries, keys and values of a token in this order; or [B, N, heads + 2*kv_heads, D]
    with kv_heads given, its first ``heads`` heads the queries, the next kv_heads the keys, the last the values. Other
    arguments as in ``qk_norm_rope``.

    Returns qkv, whose queries and keys hold what ``qk_norm_rope`` returns for them, rounded once; the values are not
    touched.
    Raises ValueError when a gradient is needed (qkv requires grad, or a weight does while gradients are recorded),
    because the backward would need what is overwritten; and as ``qk_norm_rope`` does.
    """
    if not isinstance(qkv, Tensor):
        raise TypeError(f"qkv of type {type(qkv).__name__} must be a tensor [B, N, 3, heads, D]")
    if kv_heads is None:
        qkv = _validate.tensor("qkv", qkv, "[B, N, 3, heads, D]")
        if qkv.shape[2] != 3:
            raise ValueError(f"qkv of shape {tuple(qkv.shape)} must be [B, N, 3, heads, D]")
    else:
        qkv = _validate.tensor("qkv", qkv, "[B, N, heads + 2*kv_heads, D]")
        if not is_int(kv_heads) or kv_heads < 1 or 2 * kv_heads >= qkv.shape[2]:
            raise ValueError(
                f"kv_heads={kv_heads!r} must be positive and leave queries among the {qkv.shape[2]} heads of qkv"
            )
    q, k = _queries_and_keys(qkv, kv_heads)
    recorded = torch.is_grad_enabled()
    for name, each in (("qkv", qkv), ("q_weight", q_weight), ("k_weight", k_weight)):
        if isinstance(each, Tensor) and each.requires_grad and (recorded or each is qkv):
            raise ValueError(
                f"{name} requires grad, which an update in place cannot give: use qk_norm_rope, or torch.no_grad()"
            )
    if any(stride == 0 and size > 1 for stride, size in zip(qkv.stride(), qkv.shape, strict=True)):
        raise ValueError(f"qkv of strides {qkv.stride()} is expanded: several elements share one place in memory")
    _check_pair(q, k, q_weight, k_weight, across_heads, interleaved)
    _check_rope("rope", rope, "qkv", q)
    eps = _validate.epsilon(eps)
    call = _call(q, k, q_weight, k_weight, across_heads, interleaved)
    QK_NORM_ROPE_IN_PLACE.choose(impl, call).run(
        qkv, kv_heads, q_weight, k_weight, rope, across_heads, eps, interleaved
    )
    return qkv


def _check_pair(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, across_heads: bool, interleaved: bool
) -> None:
    """Check what does not depend on the tables: dtypes, weights, devices, flags."""
    _validate.flag("across_heads", across_heads)
    _validate.flag("interleaved", interleaved)
    if k.dtype != q.dtype:
        raise TypeError(f"k of {k.dtype} must have the dtype of q, {q.dtype}")
    for name, weight, x in (("q_weight", q_weight, q), ("k_weight", k_weight, k)):
        if weight is not None:
            heads, dim = x.shape[2:]
            axes, length = ("[heads*D]", heads * dim) if across_heads else ("[D]", dim)
            _validate.shaped(name, weight, axes, (length,))
    _validate.one_device("q", q, k=k, q_weight=q_weight, k_weight=k_weight)


def _check_rope(name: str, rope: RopeTables | None, of: str, x: Tensor) -> None:
    """Check that the tables describe the tokens and the head dimension of x [B, N, heads, D]."""
    if rope is None:
        return
    if not isinstance(rope, RopeTables):
        raise TypeError(f"{name}={rope!r} must be RopeTables, from stattn.rope_tables")
    if rope.head_dim != x.shape[3]:
        raise ValueError(f"{name} turns {rope.head_dim} features, a head has {x.shape[3]}")
    # Not rope.grid.tokens: a Grid checks its sizes, and torch.compile would take them for constants.
    if rope.before + rope.t.shape[1] * rope.h.shape[1] * rope.w.shape[1] + rope.after != x.shape[1]:
        raise ValueError(f"{name} holds {rope.grid.tokens} tokens ({rope.grid}), {of} {x.shape[1]}")
    if rope.device != x.device:
        raise ValueError(f"{name} is on {rope.device}, the tokens on {x.device}")


def _queries_and_keys(qkv: Tensor, kv_heads: int | None) -> tuple[Tensor, Tensor]:
    """Return the views of a fused buffer that hold q and k."""
    if kv_heads is None:
        return qkv[:, :, 0], qkv[:, :, 1]
    heads = qkv.shape[2] - 2 * kv_heads
    return qkv[:, :, :heads], qkv[:, :, heads : heads + kv_heads]


# Choice of implementation.


def _call(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, across_heads: bool, interleaved: bool
) -> QKNormRopeCall:
    weights = tuple(each.dtype for each in (q_weight, k_weight) if each is not None)
    heads = max(q.shape[2], k.shape[2])
    return QKNormRopeCall(*device_of(q), q.dtype, heads, q.shape[3], across_heads, interleaved, weights)


def triton_why_not(call: QKNormRopeCall) -> str | None:
    if call.heads * call.head_dim > MOST_FEATURES:
        return f"holds a token's {call.heads} heads of {call.head_dim} in registers, at most {MOST_FEATURES} features"
    return _triton.why_not(call.device, call.capability, call.dtype, *call.weights)


def _triton_run(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: RopeTables | None,
    k_rope: RopeTables | None,
    across_heads: bool,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    tables, before = flatten(rope, k_rope)
    return torch.ops.stattn.qk_norm_rope(q, k, q_weight, k_weight, tables, before, across_heads, eps, interleaved)


def _triton_run_in_place(
    qkv: Tensor,
    kv_heads: int | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: RopeTables | None,
    across_heads: bool,
    eps: float,
    interleaved: bool,
) -> None:
    tables, before = flatten(rope, rope)
    torch.ops.stattn.qk_norm_rope_(qkv, kv_heads, q_weight, k_weight, tables, before, across_heads, eps, interleaved)


def _reference_run_in_place(qkv: Tensor, kv_heads: int | None, *rest: Any) -> None:
    reference_in_place(*_queries_and_keys(qkv, kv_heads), *rest)


QK_NORM_ROPE = Operation(
    "qk_norm_rope",
    (
        Implementation("triton", triton_why_not, _triton_run),
        Implementation("reference", serves_all, reference),
    ),
)
QK_NORM_ROPE_IN_PLACE = Operation(
    "qk_norm_rope_",
    (
        Implementation("triton", triton_why_not, _triton_run_in_place),
        Implementation("reference", serves_all, _reference_run_in_place),
    ),
)


# torch.library: the Triton kernels; the reference is differentiable PyTorch, called directly.

_LIBRARY = torch.library.Library("stattn", "FRAGMENT")
_ROPE = "Tensor[] tables, SymInt[] before, bool across_heads, float eps, bool interleaved"
_LIBRARY.define(f"qk_norm_rope(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, {_ROPE}) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"qk_norm_rope_backward(Tensor dq_out, Tensor dk_out, Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, "
    f"{_ROPE}, bool q_sums, bool k_sums) -> (Tensor dq, Tensor dk, Tensor dq_weight, Tensor dk_weight)"
)
_LIBRARY.define(f"qk_norm_rope_(Tensor(a!) qkv, SymInt? kv_heads, Tensor? q_weight, Tensor? k_weight, {_ROPE}) -> ()")


def flatten(rope: RopeTables | None, k_rope: RopeTables | None) -> tuple[list[Tensor], list[int]]:
    """Turn tables into arguments that a graph can hold: three tensors when q and k share them, else six."""
    if rope is None or k_rope is None:
        return [], []
    ropes = (rope,) if k_rope is rope else (rope, k_rope)
    return [table for each in ropes for table in (each.t, each.h, each.w)], [each.before for each in ropes]


# Kernel files are imported when one runs: `import stattn` must work without Triton.


def angles_of(tables: Sequence[Tensor], before: Sequence[int]) -> tuple[Any, Any]:
    from stattn.kernels.qk_norm_rope import Angles

    if not tables:
        return None, None
    q_angles = Angles(tables[0], tables[1], tables[2], before[0])
    return q_angles, q_angles if len(tables) == 3 else Angles(tables[3], tables[4], tables[5], before[1])


def _forward(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    tables: Sequence[Tensor],
    before: Sequence[int],
    *flags: Any,
) -> tuple[Tensor, Tensor]:
    from stattn.kernels import qk_norm_rope as kernels

    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    kernels.forward(q, k, q_out, k_out, q_weight, k_weight, *angles_of(tables, before), *flags)
    return q_out, k_out


def _backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    tables: Sequence[Tensor],
    before: Sequence[int],
    *flags: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from stattn.kernels import qk_norm_rope_bwd as kernels

    dq, dk, *dweights = kernels.backward(dq_out, dk_out, q, k, q_weight, k_weight, *angles_of(tables, before), *flags)
    dq_weight, dk_weight = (q.new_empty(0) if each is None else each for each in dweights)
    return dq, dk, dq_weight, dk_weight


def _in_place(
    qkv: Tensor,
    kv_heads: int | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    tables: Sequence[Tensor],
    before: Sequence[int],
    *flags: Any,
) -> None:
    from stattn.kernels import qk_norm_rope as kernels

    q, k = _queries_and_keys(qkv, kv_heads)
    kernels.forward(q, k, q, k, q_weight, k_weight, *angles_of(tables, before), *flags)
    torch.autograd.graph.increment_version(qkv)


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        tables: Sequence[Tensor],
        *rest: Any,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, q_weight, k_weight, *tables)
        ctx.rest = rest
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.stattn.qk_norm_rope(q, k, q_weight, k_weight, tables, *rest)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dq_out: Tensor, dk_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, q_weight, k_weight, *tables = ctx.saved_tensors
        need_q, need_k, need_q_weight, need_k_weight = ctx.needs_input_grad[:4]
        dq, dk, dq_weight, dk_weight = torch.ops.stattn.qk_norm_rope_backward(
            dq_out, dk_out, q, k, q_weight, k_weight, tables, *ctx.rest, need_q_weight, need_k_weight
        )
        grads = (
            dq if need_q else None,
            dk if need_k else None,
            dq_weight if need_q_weight else None,
            dk_weight if need_k_weight else None,
        )
        return (*grads, None, *(None for _ in ctx.rest))


def _autograd(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, q_weight, k_weight)):
        return _QKNormRope.apply(q, k, q_weight, k_weight, *rest)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.stattn.qk_norm_rope(q, k, q_weight, k_weight, *rest)


def _fake(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _fake_backward(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, q_sums, k_sums = rest
    dweights = (
        weight.new_empty(weight.shape) if sums and weight is not None else q.new_empty(0)
        for weight, sums in ((q_weight, q_sums), (k_weight, k_sums))
    )
    dq_weight, dk_weight = dweights
    return q.new_empty(q.shape), k.new_empty(k.shape), dq_weight, dk_weight


def _fake_in_place(qkv: Tensor, *rest: Any) -> None:
    return None


for _name, _run, _fake_run in (
    ("qk_norm_rope", _forward, _fake),
    ("qk_norm_rope_backward", _backward, _fake_backward),
    ("qk_norm_rope_", _in_place, _fake_in_place),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"stattn::{_name}", _fake_run, lib=_LIBRARY)
_LIBRARY.impl("qk_norm_rope", _autograd, "Autograd")
