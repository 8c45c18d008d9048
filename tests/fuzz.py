"""A seeded fuzzer of attention: random grids, masks, regions, ring caches, global tokens, heads, strides and gradients.

    python tests/fuzz.py --seeds 0 1000        python tests/fuzz.py --seeds 17 18        (the one-line repro of seed 17)
    python tests/fuzz.py --seeds 0 1000 --impl triton --device cuda
    python tests/fuzz.py --seeds 0 1000 --impl triton --device cuda --runs --dims 64 128

Each call is compared with a dense softmax over ``mask.allowed`` in float64: output, LSE and gradients. Each element's
error is held against the magnitudes of the terms that it sums: four roundings of the call's type for each.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import stattn
from stattn import masks
from stattn.blocks import BlockList, block_list, tile_count
from stattn.grid import Grid, Region, Triple
from stattn.masks import EMPTY, FULL, PARTIAL, Mask

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DIMS = (1, 2, 5, 8, 16, 33)
# What Triton serves, and under its interpreter: calls that are drawn for it keep to these.
TRITON_DTYPES = {"cuda": (torch.bfloat16, torch.float32, torch.float16), "cpu": (torch.float32, torch.float16)}
TRITON_DIMS = (16, 64, 24, 16, 136, 64)


@dataclass
class Call:
    """One call of ``stattn.attention``: its arguments, and what each head of each sample may see."""

    grid: Grid
    mask: Mask | BlockList | list[Mask]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    allowed: torch.Tensor  # booleans [B, heads, Nq, Nk]
    dout: torch.Tensor | None
    dlse: torch.Tensor | None
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shapes = " ".join(
            f"{n}{tuple(x.shape)}{tuple(x.stride())}" for n, x in zip("qkv", (self.q, self.k, self.v), strict=True)
        )
        return f"{self.grid} {self.mask} {self.q.dtype} {shapes} {self.options}"


# Drawing calls.


def random_mask(rng: random.Random, shape: Triple, depth: int = 0) -> Mask:
    named = ["full", "spatial", "temporal", "window", "window", "sliding_tile", "frame_causal", "radial", "tables"]
    kind = rng.choice(named + ["window", "and", "or", "or"] * (depth < 2))
    if kind == "window":
        sizes: list[int | None] = []
        strides, dilations = [], []
        for n in shape:
            dilation = rng.randint(1, min(3, n))
            size = rng.randint(1, n // dilation)
            whole = rng.random() < 0.15
            sizes.append(None if whole else size)
            strides.append(1 if whole else rng.randint(1, size))
            dilations.append(1 if whole else dilation)
        causal = tuple(rng.random() < 0.4 for _ in shape)
        return masks.window(*sizes, stride=tuple(strides), dilation=tuple(dilations), causal=causal)  # type: ignore[arg-type]
    if kind == "sliding_tile":
        tile = tuple(rng.randint(1, n + 1) for n in shape)
        counts = [-(-n // e) for n, e in zip(shape, tile, strict=True)]
        return masks.sliding_tile(tile, tuple(rng.randint(1, count) for count in counts))  # type: ignore[arg-type]
    if kind == "frame_causal":
        chunk = rng.randint(1, shape[0] + 1)
        return masks.frame_causal(chunk, rng.choice([None, chunk + rng.randint(0, shape[0])]), rng.randint(0, 2))
    if kind == "radial":
        count = rng.randint(1, 3)
        distances = sorted(rng.sample(range(shape[0] + 3), count))
        windows = [sorted((rng.randint(1, n) for _ in range(count)), reverse=True) for n in shape[1:]]
        return masks.radial(list(zip(distances, *windows, strict=True)))
    if kind == "tables":
        rules = {}
        for axis, n in zip("thw", shape, strict=True):
            if rng.random() < 0.6:
                low, high = [rng.randint(-1, n + 1) for _ in range(n)], [rng.randint(-2, n) for _ in range(n)]
                rules[axis] = (low, high)
        return masks.tables(**rules)
    if kind in ("and", "or"):
        a, b = random_mask(rng, shape, depth + 1), random_mask(rng, shape, depth + 1)
        return a & b if kind == "and" else a | b  # type: ignore[return-value]
    return masks.CONSTRUCTORS[kind].make()


def random_runs(rng: random.Random, shape: Triple) -> Mask:
    """Draw a mask by which queries see whole lines of tokens."""
    kind = rng.choice(["full", "spatial", "frame_causal", "window", "tables", "or"])
    if kind == "frame_causal":
        chunk = rng.randint(1, shape[0] + 1)
        return masks.frame_causal(chunk, rng.choice([None, chunk + rng.randint(0, shape[0])]), rng.randint(0, 2))
    if kind == "window":
        causal = (rng.random() < 0.4, rng.random() < 0.4, False)
        return masks.window(rng.randint(1, shape[0]), rng.choice([None, rng.randint(1, shape[1])]), None, causal=causal)
    if kind == "tables":
        low, high = ([rng.randint(-1, n) for n in [shape[0]] * shape[0]] for _ in range(2))
        return masks.tables(t=(low, high))
    if kind == "or":
        return masks.spatial() | masks.tables(t=([0] * shape[0], [rng.randint(0, n) for n in range(shape[0])]))
    return masks.CONSTRUCTORS[kind].make()


def random_lists(rng: random.Random, shape: Triple, batch: int, heads: int, device: str) -> BlockList:
    q_tile, k_tile = (tuple(rng.randint(1, n + 1) for n in shape) for _ in range(2))
    mask = random_mask(rng, shape) if rng.random() < 0.6 else None
    size = (rng.choice([1, batch]), rng.choice([1, heads]), tile_count(shape, q_tile), tile_count(shape, k_tile))
    kinds = torch.randint(3, size, dtype=torch.int8).to(device)
    if mask is None:
        kinds[kinds == PARTIAL] = EMPTY
    blocks = block_list(shape, q_tile, k_tile, kinds, mask)  # type: ignore[arg-type]
    if rng.random() < 0.5:  # unused entries may hold anything
        used = torch.arange(blocks.index.shape[-1], device=device) < blocks.count[..., None]
        index = torch.where(used, blocks.index, rng.choice([-1, 10**6])).to(torch.int32)
        blocks = BlockList(shape, blocks.q_tile, blocks.k_tile, blocks.count, index, blocks.partial, mask)
    if rng.random() < 0.4:
        joined = mask | blocks if mask is not None else random_mask(rng, shape) | blocks
        assert isinstance(joined, BlockList)
        return joined
    assert (blocks.kinds() == FULL).any() or (kinds != FULL).all()
    return blocks


def random_region(rng: random.Random, shape: Triple) -> Region:
    extent = tuple(rng.randint(1, n) for n in shape)
    return Region(tuple(rng.randint(0, n - e) for n, e in zip(shape, extent, strict=True)), extent)  # type: ignore[arg-type]


def strided(rng: random.Random, x: torch.Tensor, offset: int) -> torch.Tensor:
    """The same values as they are, in [B, heads, N, D] order, in a fused projection, or behind an offset."""
    kind = rng.choice(["plain", "transposed", "fused", "offset"])
    if kind == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "fused":
        return torch.stack([torch.full_like(x, torch.nan), x, torch.full_like(x, torch.nan)], dim=2)[:, :, 1]
    if kind == "offset":
        flat = torch.full((x.numel() + offset,), torch.nan, dtype=x.dtype, device=x.device)
        flat[offset:] = x.reshape(-1)
        return flat[offset:].view(x.shape)
    return x


def random_call(
    seed: int,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
    device: str = "cpu",
    dims: Sequence[int] = (),
    runs: bool = False,
) -> Call | None:
    """Draw a call that an implementation serves; None when its mask has too many products.

    dtype, dims: those to draw from, where not all that the implementation serves. runs: draw what the kernels of
    ``attention_runs`` can serve.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    triton = impl == "triton"
    dtypes = TRITON_DTYPES[torch.device(device).type] if triton else DTYPES
    dtypes = tuple(each for each in dtypes if each.itemsize == 2) if runs else dtypes
    dtype = dtype or dtypes[seed % len(dtypes)]
    shape = (rng.randint(1, 7), rng.randint(1, 7), rng.randint(1, 9))
    grid = Grid(*shape, *rng.choice([(0, 0), (0, 0), (3, 0), (0, 4), (2, 3)]))
    batch, key_heads = rng.choice([1, 2, 3] if runs else [0, 1, 1, 2, 3]), rng.choice([1, 2, 3])
    heads, dim = key_heads * rng.choice([1, 2]), rng.choice(dims or (TRITON_DIMS if triton else DIMS))

    mask: Mask | BlockList | list[Mask]
    try:
        lists = not runs and rng.random() < 0.25
        if runs:
            mask = random_runs(rng, shape)
        elif lists:
            mask = random_lists(rng, shape, max(batch, 1), heads, device)
        elif rng.random() < 0.25:
            mask = [random_mask(rng, shape) for _ in range(heads)]
        else:
            mask = random_mask(rng, shape)
        for each in [] if isinstance(mask, BlockList) else mask if isinstance(mask, list) else [mask]:
            each.pack(grid)
    except ValueError as error:
        if "more than 8" in str(error):
            return None
        raise

    options: dict[str, Any] = {"globals_see": rng.choice(["all", "all", "globals"])}
    if rng.random() < 0.3:
        options["scale"] = rng.choice([0.3, 1, -0.5, 0.0])
    frames = None
    if not lists:
        if rng.random() < 0.35:
            options["q_region"] = random_region(rng, shape)
        if rng.random() < 0.35:
            options["k_region"] = random_region(rng, shape)
        if not runs and rng.random() < 0.3:
            slots = rng.randint(1, shape[0] + 2)
            held = rng.sample(range(shape[0]), min(shape[0], rng.randint(0, slots)))
            frames = (held + [-1] * slots)[:slots]
            rng.shuffle(frames)
            options["k_frames"] = torch.tensor(frames, dtype=torch.int32)
            if "k_region" in options:
                box = options["k_region"]
                options["k_region"] = Region((0, *box.origin[1:]), (shape[0], *box.extent[1:]))
    valid = torch.ones(batch, grid.globals, dtype=torch.bool)
    if grid.globals and not runs and rng.random() < 0.5:
        if grid.before and grid.after or rng.random() < 0.5:
            options["valid"] = valid = torch.rand(batch, grid.globals) < 0.5
        else:
            options["valid"] = torch.randint(grid.globals + 1, (batch,))
            valid = torch.arange(grid.globals) < options["valid"][:, None]

    rows = tokens_of(grid, options.get("q_region"), None, not grid.globals or rng.random() < 0.7)
    columns = tokens_of(grid, options.get("k_region"), frames, True)
    allowed = torch.zeros(batch, heads, len(rows), len(columns), dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            see = {"globals_see": options["globals_see"], "valid": valid[b]}
            if isinstance(mask, BlockList):
                table = masks.full().allowed(grid, **see)
                video = slice(grid.before, grid.before + grid.video)
                table[video, video] = mask.allowed(b, h).cpu()
                table = table[rows][:, columns]
            else:
                table = (mask[h] if isinstance(mask, list) else mask).allowed(grid, rows, columns.clamp(min=0), **see)
            allowed[b, h] = table & (columns >= 0)

    q, k, v = (
        strided(rng, torch.randn(batch, n, h, dim, dtype=torch.float64).to(device, dtype), 8 if runs else 3)
        for n, h in ((len(rows), heads), (len(columns), key_heads), (len(columns), key_heads))
    )
    if rng.random() < 0.3:  # some of what sees nothing, or is never seen, is not read
        if triton:  # which reads whole boxes: what is not real
            is_real = torch.ones(batch, grid.tokens, dtype=torch.bool)
            is_real[:, : grid.before] = valid[:, : grid.before]
            is_real[:, grid.before + grid.video :] = valid[:, grid.before :]
            q[~is_real[:, rows]] = torch.nan
            gone = ~is_real[:, columns.clamp(min=0)] | (columns < 0)
            k[gone] = v[gone] = torch.nan
        else:
            q[~allowed.any(-1).transpose(1, 2)] = torch.nan
            if not lists:  # which read whole tiles
                unseen = ~allowed.unflatten(1, (key_heads, -1)).any(2).any(2).transpose(1, 2)
                k[unseen] = v[unseen] = torch.nan
    dout = torch.randn(q.shape, dtype=torch.float64).to(device, dtype)
    if runs:
        dout = strided(rng, dout, 8)
    elif rng.random() < 0.2:
        dout = torch.ones((), dtype=dtype, device=device).expand(q.shape)
    elif rng.random() < 0.2:
        dout = dout.transpose(-1, -2).contiguous().transpose(-1, -2)
    dlse = torch.randn(batch, heads, len(rows), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    dlse = dlse.to(device)
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    wanted = rng.choice(["both", "out"] if runs else ["both", "both", "out", "lse"])
    return Call(
        grid, mask, q, k, v, allowed, dout if wanted != "lse" else None, dlse if wanted != "out" else None, options
    )


def tokens_of(grid: Grid, region: Region | None, frames: list[int] | None, with_globals: bool) -> torch.Tensor:
    """The grid's token that each row holds, -1 for none."""
    video = torch.arange(grid.video).reshape(grid.shape) + grid.before
    if region is not None:
        video = video[tuple(slice(o, o + e) for o, e in zip(region.origin, region.extent, strict=True))]
    if frames is not None:
        video = torch.stack([video[f] if f >= 0 else torch.full_like(video[0], -1) for f in frames])
    tokens = torch.arange(grid.tokens)
    around = (tokens[: grid.before], tokens[grid.before + grid.video :]) if with_globals else (tokens[:0], tokens[:0])
    return torch.cat([around[0], video.reshape(-1), around[1]])


# Checking them.


NAMES = ("out", "lse", "dq", "dk", "dv")


def dense(call: Call) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Output, LSE, dq, dk and dv of a dense masked softmax in float64, each beside the rounding that it allows.

    Rounding the terms of a sum moves it by eps times the sum of their magnitudes, but not by less than the type's least
    number; a sum of n terms in the accumulator's type adds about sqrt(n) roundings of that. Scores are summed in fp32
    (float64 for float64) whatever the type, and an error of a score is a relative error of its weight.
    """
    q, k, v = (x.detach().cpu().double().nan_to_num() for x in (call.q, call.k, call.v))
    dout = torch.zeros_like(q) if call.dout is None else call.dout.cpu().double()
    dlse = torch.zeros(call.allowed.shape[:3]).double() if call.dlse is None else call.dlse.cpu().double()
    scale = call.options.get("scale", 1 / math.sqrt(q.shape[3]))
    group = q.shape[2] // k.shape[2]
    ke, ve = (x.repeat_interleave(group, 2) for x in (k, v))
    acc = torch.finfo(torch.float64 if call.q.dtype == torch.float64 else torch.float32).eps

    def pairs(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bqhd,bkhd->bhqk", a, b)

    def over_keys(p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bhqk,bkhd->bqhd", p, x)

    def over_queries(p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bhqk,bqhd->bkhd", p, x).unflatten(2, (-1, group)).sum(3)

    some = call.allowed.any(-1)
    scores = (pairs(q, ke) * scale).masked_fill(~call.allowed, -torch.inf).masked_fill(~some[..., None], 0.0)
    lse = torch.logsumexp(scores, -1)
    p = torch.exp(scores - lse[..., None]) * call.allowed
    out = over_keys(p, ve)
    delta = (dout * out).sum(-1).transpose(1, 2) - dlse
    ds = p * (pairs(dout, ve) - delta[..., None]) * scale

    sizes = (pairs(q.abs(), ke.abs()) * abs(scale) * call.allowed).amax(-1, keepdim=True)  # of a row's scores
    eps = torch.finfo(call.q.dtype).eps + acc * (sizes + math.sqrt(sum(call.allowed.shape[2:])))  # [B, heads, Nq, 1]
    least = torch.finfo(call.q.dtype).smallest_normal * torch.finfo(call.q.dtype).eps
    p_eps = p * eps + least * call.allowed
    delta_size = (dout.abs() * over_keys(p, ve.abs())).sum(-1).transpose(1, 2) + dlse.abs()
    ds_eps = p_eps * (pairs(dout.abs(), ve.abs()) + delta_size[..., None]) * abs(scale)
    results = [
        (out, over_keys(p_eps, ve.abs())),
        (torch.where(some, lse, -torch.inf), eps[..., 0] * (1 + lse.abs())),
        (over_keys(ds, ke), over_keys(ds_eps, ke.abs())),
        (over_queries(ds, q), over_queries(ds_eps, q.abs())),
        (over_queries(p, dout), over_queries(p_eps, dout.abs())),
    ]
    return [(value, 4 * rounding + least) for value, rounding in results]


def failure(call: Call, impl: str = "auto") -> str | None:
    """Run a call and say what differs from the dense softmax, or None."""
    leaves = [x.detach().requires_grad_() for x in (call.q, call.k, call.v)]
    before = [x.detach().clone() for x in leaves]
    out, lse = stattn.attention(*leaves, call.grid, call.mask, return_lse=True, impl=impl, **call.options)
    given = [(x, g) for x, g in ((out, call.dout), (lse, call.dlse)) if g is not None]
    grads = torch.autograd.grad([x for x, _ in given], leaves, [g for _, g in given])
    for name, x, same in zip("qkv", leaves, before, strict=True):
        if not torch.equal(x.nan_to_num(), same.nan_to_num()):
            return f"{name} was modified"
    for name, value, (true, rounding) in zip(NAMES, (out, lse, *grads), dense(call), strict=True):
        got = value.detach().cpu()
        if got.shape != true.shape:
            return f"{name} has shape {tuple(got.shape)}, expected {tuple(true.shape)}"
        if not torch.equal(got.isneginf(), true.isneginf()) or got.isnan().any():
            return f"{name} has infinities or NaN in the wrong places"
        excess = (got.double() - true).abs().masked_fill(true.isneginf(), 0.0) - rounding
        if excess.numel() and excess.max() > 0:
            at = tuple(int(x) for x in torch.unravel_index(excess.argmax(), excess.shape))
            return f"{name}{list(at)} is {got[at]}, expected {true[at]:.9g} to {rounding[at]:.2g}"
    return None


def check(
    seed: int,
    impl: str = "auto",
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    dims: Sequence[int] = (),
    runs: bool = False,
) -> bool:
    """Run one seed. Returns False when it drew no call; raises AssertionError with a repro when results differ."""
    call = random_call(seed, dtype, impl, device, dims, runs)
    if call is None:
        return False
    wrong = failure(call, impl)
    repro = f"repro: python tests/fuzz.py --seeds {seed} {seed + 1} --impl {impl} --device {device}"
    repro += f" --dims {' '.join(map(str, dims))}" * bool(dims) + " --runs" * runs
    assert wrong is None, f"{wrong}\n{call}\n{repro}"
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz stattn.attention against a dense softmax.")
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 1000), metavar=("FIRST", "LAST"))
    parser.add_argument("--impl", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dims", type=int, nargs="+", default=(), help="head dimensions to draw from")
    parser.add_argument("--runs", action="store_true", help="draw masks by which queries see whole lines of tokens")
    options = parser.parse_args()
    wrong = 0
    for seed in range(*options.seeds):
        try:
            check(seed, options.impl, None, options.device, options.dims, options.runs)
        except AssertionError as error:
            wrong += 1
            print(f"seed {seed}: {error}", flush=True)
    print(f"{wrong} of {options.seeds[1] - options.seeds[0]} seeds went wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
