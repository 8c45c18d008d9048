"""RMSNorm of queries and keys with 3-D rotary position embedding: ``qk_norm_rope`` and, in place, ``qk_norm_rope_``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stattn.grid import is_int
from stattn.ops import _validate
from stattn.ops._dispatch import Implementation, Operation
from stattn.reference.qk_norm_rope import qk_norm_rope as reference
from stattn.reference.qk_norm_rope import qk_norm_rope_ as reference_in_place
from stattn.rope import RopeTables


class QKNormRopeCall(NamedTuple):
    """What the choice of an implementation depends on."""

    device: str
    dtype: torch.dtype
    head_dim: int
    across_heads: bool
    interleaved: bool


QK_NORM_ROPE = Operation("qk_norm_rope", (Implementation("reference", lambda call: None, reference),))
QK_NORM_ROPE_IN_PLACE = Operation(
    "qk_norm_rope_", (Implementation("reference", lambda call: None, reference_in_place),)
)


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
    Differentiable in q, k and weights.
    Raises ValueError or TypeError for wrong shapes, dtypes, devices, an odd D, or tables of another grid.
    RMSNorm: arXiv:1910.07467; rotary embedding: arXiv:2104.09864.
    """
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
    _check_rope("rope", rope, q)
    _check_rope("k_rope", k_rope, k)
    eps = _validate.epsilon(eps)
    call = QKNormRopeCall(q.device.type, q.dtype, q.shape[-1], across_heads, interleaved)
    return QK_NORM_ROPE.choose(impl, call).run(q, k, q_weight, k_weight, rope, k_rope, across_heads, eps, interleaved)


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
        q, k = qkv[:, :, 0], qkv[:, :, 1]
    else:
        qkv = _validate.tensor("qkv", qkv, "[B, N, heads + 2*kv_heads, D]")
        if not is_int(kv_heads) or kv_heads < 1 or 2 * kv_heads >= qkv.shape[2]:
            raise ValueError(
                f"kv_heads={kv_heads!r} must be positive and leave queries among the {qkv.shape[2]} heads of qkv"
            )
        heads = qkv.shape[2] - 2 * kv_heads
        q, k = qkv[:, :, :heads], qkv[:, :, heads : heads + kv_heads]
    recorded = torch.is_grad_enabled()
    for name, each in (("qkv", qkv), ("q_weight", q_weight), ("k_weight", k_weight)):
        if isinstance(each, Tensor) and each.requires_grad and (recorded or each is qkv):
            raise ValueError(
                f"{name} requires grad, which an update in place cannot give: use qk_norm_rope, or torch.no_grad()"
            )
    if any(stride == 0 and size > 1 for stride, size in zip(qkv.stride(), qkv.shape, strict=True)):
        raise ValueError(f"qkv of strides {qkv.stride()} is expanded: several elements share one place in memory")
    _check_pair(q, k, q_weight, k_weight, across_heads, interleaved)
    _check_rope("rope", rope, q)
    eps = _validate.epsilon(eps)
    call = QKNormRopeCall(q.device.type, q.dtype, q.shape[-1], across_heads, interleaved)
    QK_NORM_ROPE_IN_PLACE.choose(impl, call).run(q, k, q_weight, k_weight, rope, across_heads, eps, interleaved)
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


def _check_rope(name: str, rope: RopeTables | None, x: Tensor) -> None:
    """Check that the tables describe the tokens and the head dimension of x [B, N, heads, D]."""
    if rope is None:
        return
    if not isinstance(rope, RopeTables):
        raise TypeError(f"{name}={rope!r} must be RopeTables, from stattn.rope_tables")
    if rope.head_dim != x.shape[3]:
        raise ValueError(f"{name} turns {rope.head_dim} features, a head has {x.shape[3]}")
    if rope.grid.tokens != x.shape[1]:
        raise ValueError(f"{name} holds {rope.grid.tokens} tokens ({rope.grid}), x {x.shape[1]}")
    if rope.device != x.device:
        raise ValueError(f"{name} is on {rope.device}, the tokens on {x.device}")
