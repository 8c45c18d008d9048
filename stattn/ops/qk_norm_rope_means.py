"""``qk_norm_rope`` with the mean key of every tile on the way, for ``top_k`` and ``top_p``: ``qk_norm_rope_means``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stattn.blocks import tile_count
from stattn.grid import Triple, check_triple
from stattn.ops._dispatch import Implementation, Operation, serves_all
from stattn.ops.qk_norm_rope import angles_of, check, flatten, qk_norm_rope, triton_why_not
from stattn.reference.qk_norm_rope_means import qk_norm_rope_means as reference
from stattn.rope import RopeTables


def _triton_run(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: RopeTables,
    k_rope: RopeTables,
    across_heads: bool,
    eps: float,
    interleaved: bool,
    k_tile: Triple,
) -> tuple[Tensor, Tensor, Tensor]:
    tables, before = flatten(rope, k_rope)
    rest = (tables, before, across_heads, eps, interleaved, list(k_tile))
    return torch.ops.stattn.qk_norm_rope_means(q, k, q_weight, k_weight, *rest)


QK_NORM_ROPE_MEANS = Operation(
    "qk_norm_rope_means",
    (
        Implementation("triton", triton_why_not, _triton_run),
        Implementation("reference", serves_all, reference),
    ),
)


def qk_norm_rope_means(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: RopeTables,
    *,
    k_tile: Triple,
    k_rope: RopeTables | None = None,
    across_heads: bool = False,
    eps: float = 1e-6,
    interleaved: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise and rotate queries and keys as ``qk_norm_rope`` does, and average the keys of each tile in that pass.

    rope: not None; the tiles divide its grid. k_tile: extents (t, h, w) of a tile in tokens, as ``top_k`` takes them.
    All other arguments are those of ``qk_norm_rope``.

    Returns (q', k', k_means): k_means [B, kv_heads, tiles, D] are the means of k', as it is rounded, over its video
    tokens, in float32 (float64 for float64); give them to ``top_k`` or ``top_p`` with the same tile, which then read
    q alone. q' and k' are differentiable; the means have no gradient, as selection has none. Where a gradient is asked
    for, Triton makes them in a pass of their own. Raises as ``qk_norm_rope`` does, and for a tile that is no triple.
    """
    if rope is None:
        raise ValueError("rope=None says nothing of the grid that tiles cut: give the tables of rope_tables")
    check_triple("k_tile", k_tile)
    found, eps, call = check(q, k, q_weight, k_weight, rope, k_rope, across_heads, eps, interleaved)
    chosen = QK_NORM_ROPE_MEANS.choose(impl, call)
    given: tuple[Any, ...] = (q, k, q_weight, k_weight)
    tracked = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in given)
    rest = (across_heads, eps, interleaved)
    if chosen.name != "triton" or not tracked:
        return chosen.run(*given, rope, found, *rest, k_tile)
    q_out, k_out = qk_norm_rope(
        q,
        k,
        q_weight,
        k_weight,
        rope,
        k_rope=k_rope,
        across_heads=across_heads,
        eps=eps,
        interleaved=interleaved,
        impl=chosen.name,
    )
    detached = (None if each is None else each.detach() for each in given)
    return q_out, k_out, chosen.run(*detached, rope, found, *rest, k_tile)[2]


# torch.library.

_LIBRARY = torch.library.Library("stattn", "FRAGMENT")
_LIBRARY.define(
    "qk_norm_rope_means(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor[] tables, SymInt[] before, "
    "bool across_heads, float eps, bool interleaved, SymInt[] k_tile) -> (Tensor, Tensor, Tensor)"
)


def _forward(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    tables: Sequence[Tensor],
    before: Sequence[int],
    across_heads: bool,
    eps: float,
    interleaved: bool,
    k_tile: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    from stattn.kernels.qk_norm_rope_means import forward_with_means

    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    t, h, w = k_tile
    means = forward_with_means(
        q, k, q_out, k_out, q_weight, k_weight, *angles_of(tables, before), across_heads, eps, interleaved, (t, h, w)
    )
    return q_out, k_out, means


def _fake(
    q: Tensor, k: Tensor, q_weight: Any, k_weight: Any, tables: Sequence[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    t, h, w = rest[-1]
    extents = [table.shape[1] for table in tables[-3:]]
    tiles = tile_count((extents[0], extents[1], extents[2]), (t, h, w))
    means = k.new_empty((k.shape[0], k.shape[2], tiles, k.shape[3]), dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), means


_LIBRARY.impl("qk_norm_rope_means", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("qk_norm_rope_means", torch.library.fallthrough_kernel, "Autograd")
torch.library.register_fake("stattn::qk_norm_rope_means", _fake, lib=_LIBRARY)
