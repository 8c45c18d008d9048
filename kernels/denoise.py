# mypy: allow-untyped-defs, allow-incomplete-defs
"""One denoising step in one pass over the latent.

    o  = u + guidance * (c - u)                    c, u the model's outputs with and without the condition
    p  = to_x * x + to_o * o                       the prediction converted to the solver's target
    x' = w0 * x + w1 * p + sum_i w_i * history_i + wz * z
    x' = m * x' + (1 - m) * (a * known + s * z)    m = 1 where the sample is generated

A tile is [CHANNELS, PLACES] of one sample; places are (t, h, w) in row-major order. Outputs in tokens are gathered from
patches on the way, with channels the fastest axis in memory, and turned in shared memory; everything else is read and
written along w. z is a tensor, or drawn in registers (``_philox``), four numbers from each counter.

CFG-Zero* scales u by <c, u> / (|u|^2 + 1e-8) first; rescaling multiplies o by 1 - r + r * std(c) / std(o). Both follow
from five sums over the sample, of c, u, c^2, u^2 and c * u, which a first kernel takes in float64 (their products are
exact there, and the variance of o is a difference of large numbers). It leaves PARTIALS of each, which every program of
the second kernel adds in one order: results do not depend on the batch or on timing.

All else is fp32, p and x' are each rounded once. A tensor of weight 0 is not read. Bound by memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stattn.kernels import _philox
from stattn.kernels._compile import Specialization
from stattn.kernels._device import on_device
from stattn.kernels._philox import four_normals, in_order, philox_normal
from stattn.problem import Step


class Config(NamedTuple):
    """Elements of a tile and its warps, and of a tile that draws numbers; the same of the kernel that sums."""

    elements: int
    warps: int
    drawn_elements: int
    sum_elements: int
    sum_warps: int


CONFIGS = (
    Config(elements=2048, warps=4, drawn_elements=1024, sum_elements=4096, sum_warps=8),
    Config(elements=1024, warps=4, drawn_elements=512, sum_elements=2048, sum_warps=4),
    Config(elements=1024, warps=2, drawn_elements=512, sum_elements=8192, sum_warps=8),
    Config(elements=4096, warps=8, drawn_elements=2048, sum_elements=4096, sum_warps=4),
)
MOST_PARTIALS = 256
MOST_CHANNELS = 16  # of a tile of tokens


# The step.


@triton.jit
def aligned(x, ALIGN: tl.constexpr):
    """Return x, a multiple of ALIGN, so that the compiler knows that it is one."""
    return x // ALIGN * ALIGN


@triton.jit
def load_latent(
    ptr, batch, b_stride, c_stride, t_stride, h_stride, w_stride, c, s, mask, height, width, ALIGN: tl.constexpr
):
    """Load places s of channels c as fp32. t_stride None: the axes t, h and w of the tensor are one."""
    if t_stride is None:
        at = ptr + batch * aligned(b_stride, ALIGN) + (c * aligned(c_stride, ALIGN) + s)
    else:
        place = s // width // height * t_stride + s // width % height * h_stride + s % width * w_stride
        at = ptr + batch * b_stride + (c * c_stride + place)
    return tl.load(at, mask=mask, other=0).to(tl.float32)


@triton.jit
def load_output(
    ptr, batch, b_stride, c_stride, t_stride, h_stride, w_stride, c, s, mask, channels, height, width,
    ALIGN: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
):  # fmt: skip
    """Load a model's output as fp32: latents, or with PT > 0 tokens, c_stride of features and t_stride of tokens."""
    if PT == 0:
        x = load_latent(ptr, batch, b_stride, c_stride, t_stride, h_stride, w_stride, c, s, mask, height, width, ALIGN)
    else:
        w = s % width
        h = s // width % height
        t = s // width // height
        token = (t // PT * tl.cdiv(height, PH) + h // PH) * tl.cdiv(width, PW) + w // PW
        pixel = (t % PT * PH + h % PH) * PW + w % PW
        at = ptr + batch * b_stride + (token * t_stride + pixel * (channels * c_stride) + c * c_stride)
        x = tl.load(at, mask=mask, other=0).to(tl.float32)
    return x


@triton.jit
def tile_of(block, channels, places, CHANNELS: tl.constexpr, PLACES: tl.constexpr, LONG: tl.constexpr):
    """Return channels [CHANNELS, 1] and places [1, PLACES] of a sample's tile, and which of them exist."""
    across = tl.cdiv(places, PLACES)
    c = block // across * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    s = block % across * PLACES + tl.arange(0, PLACES)[None, :]
    mask = (c < channels) & (s < places)
    if LONG:
        c, s = c.to(tl.int64), s.to(tl.int64)
    return c, s, mask


@triton.jit(do_not_specialize=("height", "width"))
def denoise_sums(
    sums_ptr, output_ptr, output_b, output_c, output_t, output_h, output_w,
    uncond_ptr, uncond_b, uncond_c, uncond_t, uncond_h, uncond_w, channels, place_units, height, width,
    CHANNELS: tl.constexpr, PLACES: tl.constexpr, ALIGN: tl.constexpr, LONG: tl.constexpr, PARTIALS: tl.constexpr,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
):  # fmt: skip
    """Store partial sums of c, u, c^2, u^2 and c * u, float64 [B, 5, PARTIALS], of a sample's tiles i, i + PARTIALS."""
    places = place_units * ALIGN
    part, sample = tl.program_id(0) % PARTIALS, (tl.program_id(0) // PARTIALS).to(tl.int64)
    tiles = tl.cdiv(channels, CHANNELS) * tl.cdiv(places, PLACES)
    WIDTH: tl.constexpr = PLACES if CHANNELS > 1 else PLACES // 8
    c_sum = tl.zeros((WIDTH,), tl.float64)
    u_sum, cc_sum, uu_sum, cu_sum = c_sum, c_sum, c_sum, c_sum
    for i in range(tl.cdiv(tiles - part, PARTIALS)):
        c, s, mask = tile_of(part + i * PARTIALS, channels, places, CHANNELS, PLACES, LONG)
        cond = load_output(
            output_ptr, sample, output_b, output_c, output_t, output_h, output_w,
            c, s, mask, channels, height, width, ALIGN, PT, PH, PW,
        )  # fmt: skip
        uncond = load_output(
            uncond_ptr, sample, uncond_b, uncond_c, uncond_t, uncond_h, uncond_w,
            c, s, mask, channels, height, width, ALIGN, PT, PH, PW,
        )  # fmt: skip
        cond, uncond = cond.to(tl.float64), uncond.to(tl.float64)
        if CHANNELS == 1:
            cond, uncond = cond.reshape(PLACES // 8, 8).trans(), uncond.reshape(PLACES // 8, 8).trans()
        # The axis in a thread's hands is added now, the rest after the loop.
        c_sum += tl.sum(cond, axis=0)
        u_sum += tl.sum(uncond, axis=0)
        cc_sum += tl.sum(cond * cond, axis=0)
        uu_sum += tl.sum(uncond * uncond, axis=0)
        cu_sum += tl.sum(cond * uncond, axis=0)
    at = sums_ptr + sample * (5 * PARTIALS) + part
    tl.store(at, tl.sum(c_sum))
    tl.store(at + PARTIALS, tl.sum(u_sum))
    tl.store(at + 2 * PARTIALS, tl.sum(cc_sum))
    tl.store(at + 3 * PARTIALS, tl.sum(uu_sum))
    tl.store(at + 4 * PARTIALS, tl.sum(cu_sum))


@triton.jit
def add_five(a0, a1, a2, a3, a4, b0, b1, b2, b3, b4):
    """Add five sums at once, in one exchange between warps."""
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4


@triton.jit
def add_two(a0, a1, b0, b1):
    """Add two sums at once."""
    return a0 + b0, a1 + b1


@triton.jit
def guidance_factors(
    sums_ptr, sample, count, guidance, rescale, STAR: tl.constexpr, RESCALE: tl.constexpr, PARTIALS: tl.constexpr
):
    """Return the factors of u and of the guided output."""
    at = sums_ptr + sample * (5 * PARTIALS) + tl.arange(0, PARTIALS)
    if RESCALE:
        parts = (
            tl.load(at), tl.load(at + PARTIALS), tl.load(at + 2 * PARTIALS), tl.load(at + 3 * PARTIALS),
            tl.load(at + 4 * PARTIALS),
        )  # fmt: skip
        c, u, cc, uu, cu = tl.reduce(parts, 0, add_five)
    else:
        uu, cu = tl.reduce((tl.load(at + 3 * PARTIALS), tl.load(at + 4 * PARTIALS)), 0, add_two)
    star = cu * 0 + 1.0
    if STAR:
        star = cu / (uu + 1e-8)
    factor = 1.0
    if RESCALE:
        # Variances times count^2: every program does this sum, and a division in float64 takes its time.
        n = count.to(tl.float64)
        strength = c * 0 + guidance
        rest = (1.0 - strength) * star
        total = strength * c + rest * u
        both, one, other = 2.0 * strength * rest * cu, strength * strength * cc, rest * rest * uu
        spread = n * (one + both + other) - total * total
        wanted = tl.maximum(n * cc - c * c, 0.0)
        # The rounding of these sums gives a constant output a spread of 1e-16 of them.
        varies = spread > 1e-14 * n * (one + tl.abs(both) + other)
        ratio = tl.sqrt(tl.where(varies, wanted / tl.where(varies, spread, 1.0), 1.0).to(tl.float32))
        factor = rescale * ratio + (1.0 - rescale)
    return star.to(tl.float32), factor


@triton.jit
def added(total, weight, x):
    """Add weight * x, or nothing, whatever x is, when the weight is 0."""
    return tl.where(weight == 0, total, total + weight * x)


@triton.jit(do_not_specialize=("height", "width", "offset"))
def denoise_advance(
    next_ptr, target_ptr, sums_ptr, seeds_ptr,
    sample_ptr, sample_b, sample_c, sample_t, sample_h, sample_w,
    output_ptr, output_b, output_c, output_t, output_h, output_w,
    uncond_ptr, uncond_b, uncond_c, uncond_t, uncond_h, uncond_w,
    past_ptr, past_b, past_c, past_t, past_h, past_w,
    older_ptr, older_b, older_c, older_t, older_h, older_w,
    oldest_ptr, oldest_b, oldest_c, oldest_t, oldest_h, oldest_w,
    noise_ptr, noise_b, noise_c, noise_t, noise_h, noise_w,
    known_ptr, known_b, known_c, known_t, known_h, known_w,
    generated_ptr, generated_b, generated_c, generated_t, generated_h, generated_w,
    channels, place_units, height, width, offset, guidance, rescale, to_sample, to_output,
    sample_weight, target_weight, past_weight, older_weight, oldest_weight, noise_weight, known_weight, kept_noise,
    CHANNELS: tl.constexpr, PLACES: tl.constexpr, ALIGN: tl.constexpr, LONG: tl.constexpr, PARTIALS: tl.constexpr,
    STAR: tl.constexpr, RESCALE: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
):  # fmt: skip
    """Store a tile of the next state and of the converted prediction."""
    places = place_units * ALIGN
    tiles = tl.cdiv(channels, CHANNELS) * tl.cdiv(places, PLACES)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    block = tl.program_id(0) % tiles
    c, s, mask = tile_of(block, channels, places, CHANNELS, PLACES, LONG)
    x = load_latent(
        sample_ptr, sample, sample_b, sample_c, sample_t, sample_h, sample_w, c, s, mask, height, width, ALIGN
    )
    o = load_output(
        output_ptr, sample, output_b, output_c, output_t, output_h, output_w,
        c, s, mask, channels, height, width, ALIGN, PT, PH, PW,
    )  # fmt: skip
    if uncond_ptr is not None:
        u = load_output(
            uncond_ptr, sample, uncond_b, uncond_c, uncond_t, uncond_h, uncond_w,
            c, s, mask, channels, height, width, ALIGN, PT, PH, PW,
        )  # fmt: skip
        if STAR or RESCALE:
            count = channels.to(tl.int64) * places
            star, factor = guidance_factors(sums_ptr, sample, count, guidance, rescale, STAR, RESCALE, PARTIALS)
        if STAR:
            u *= star
        o = u + guidance * (o - u)
        if RESCALE:
            o *= factor
    p = tl.where(to_output == 0, 0.0, to_output * o)
    p = tl.where(to_sample == 0, p, to_sample * x + p)

    following = added(tl.where(sample_weight == 0, 0.0, sample_weight * x), target_weight, p)
    if past_ptr is not None:
        past = load_latent(
            past_ptr, sample, past_b, past_c, past_t, past_h, past_w,
            c, s, mask & (past_weight != 0), height, width, ALIGN,
        )  # fmt: skip
        following = added(following, past_weight, past)
    if older_ptr is not None:
        older = load_latent(
            older_ptr, sample, older_b, older_c, older_t, older_h, older_w,
            c, s, mask & (older_weight != 0), height, width, ALIGN,
        )  # fmt: skip
        following = added(following, older_weight, older)
    if oldest_ptr is not None:
        oldest = load_latent(
            oldest_ptr, sample, oldest_b, oldest_c, oldest_t, oldest_h, oldest_w,
            c, s, mask & (oldest_weight != 0), height, width, ALIGN,
        )  # fmt: skip
        following = added(following, oldest_weight, oldest)
    z = x
    if seeds_ptr is not None:
        quad = block % tl.cdiv(places, PLACES) * (PLACES // 4) + tl.arange(0, PLACES // 4)[None, :]
        quad = c.to(tl.int64) * (places // 4) + quad
        n0, n1, n2, n3 = four_normals(tl.load(seeds_ptr + sample), offset.to(tl.int64), quad)
        z = in_order(n0, n1, n2, n3).reshape(CHANNELS, PLACES)
    elif noise_ptr is not None:
        z = load_latent(
            noise_ptr, sample, noise_b, noise_c, noise_t, noise_h, noise_w,
            c, s, mask & ((noise_weight != 0) | (kept_noise != 0)), height, width, ALIGN,
        )  # fmt: skip
    if seeds_ptr is not None or noise_ptr is not None:
        following = added(following, noise_weight, z)
    if known_ptr is not None:
        known = load_latent(
            known_ptr, sample, known_b, known_c, known_t, known_h, known_w,
            c, s, mask & (known_weight != 0), height, width, ALIGN,
        )  # fmt: skip
        m = load_latent(
            generated_ptr, sample, generated_b, generated_c, generated_t, generated_h, generated_w,
            c, s, mask, height, width, ALIGN,
        )  # fmt: skip
        kept = tl.where(known_weight == 0, 0.0, known_weight * known)
        if seeds_ptr is not None or noise_ptr is not None:
            kept = added(kept, kept_noise, z)
        blend = m * following + (1 - m) * kept
        following = tl.where(m == 1, following, tl.where(m == 0, kept, blend))
    at = sample * (channels.to(tl.int64) * places) + (c * places + s)
    tl.store(next_ptr + at, following.to(next_ptr.dtype.element_ty), mask=mask)
    tl.store(target_ptr + at, p.to(target_ptr.dtype.element_ty), mask=mask)


# Launchers.


def _strides(x: Tensor | None, size: torch.Size) -> tuple[int | None, ...]:
    """Return the strides of a latent (b, c, t, h, w), the last three None where these axes are one."""
    if x is None:
        return None, None, None, None, None
    strides = x.expand(size).stride()
    wanted = (size[3] * size[4], size[4], 1)
    if all(n == 1 or have == want for n, have, want in zip(size[2:], strides[2:], wanted, strict=True)):
        return *strides[:2], None, None, None
    return strides


def _token_strides(x: Tensor | None) -> tuple[int | None, ...]:
    return (None,) * 5 if x is None else (x.stride(0), x.stride(2), x.stride(1), None, None)


def _reach(x: Tensor | None) -> int:
    """Return the largest offset within a sample."""
    return 0 if x is None else sum((n - 1) * stride for n, stride in zip(x.shape[1:], x.stride()[1:], strict=True))


def _tile(elements: int, channels: int, tokens: bool) -> dict[str, int]:
    """Return the channels and the places of a tile: one row of a latent, several of tokens, whose channels are fast."""
    rows = min(triton.next_power_of_2(channels), MOST_CHANNELS) if tokens else 1
    return {"CHANNELS": rows, "PLACES": elements // rows}


def advance(step: Step, config: Config = CONFIGS[0]) -> tuple[Tensor, Tensor]:
    """Return the next state and the converted prediction, contiguous."""
    sample, output, uncond, noise, known, generated, history, seeds, *_ = step
    patch, noise_weight, known_weights = step.patch, step.noise_weight, step.known_weights
    reduces = step.zero_star or step.rescale != 0
    size = sample.shape
    following, target = (torch.empty(size, dtype=sample.dtype, device=sample.device) for _ in range(2))
    if sample.numel() == 0:
        return following, target
    batch, channels, frames, height, width = size
    places = frames * height * width
    if seeds is not None:
        seeds = None if noise_weight == 0 and known_weights[1] == 0 else seeds.contiguous()
    if seeds is not None and places % 4:
        # Counters make four numbers each: a tile draws whole fours only where channels begin with one.
        noise, seeds = philox_normal(seeds, step.offset, size), None
    if reduces:
        parts = min(MOST_PARTIALS, triton.next_power_of_2(triton.cdiv(channels * places, config.sum_elements)))
    else:
        parts = 1
    sums = torch.empty((batch, 5, parts), dtype=torch.float64, device=sample.device) if reduces else None
    pt, ph, pw = patch or (0, 0, 0)
    outputs: list[Any] = []
    for each in (output, uncond):
        outputs += [each, *(_strides(each, size) if patch is None else _token_strides(each))]
    past: list[Any] = []
    for each in (*history, *(None for _ in range(3 - len(history)))):
        past += [each, *_strides(each, size)]
    others: list[Any] = []
    for each in (noise, known, generated):
        others += [each, *_strides(each, size)]
    given = [sample, *_strides(sample, size), *outputs, *past, *others]
    flat = [i for i in range(0, len(given), 6) if given[i] is not None and given[i + 3] is None]
    shared = {
        "ALIGN": math.gcd(16, places, *(stride for i in flat for stride in given[i + 1 : i + 3])),
        "LONG": max(places * channels, *(_reach(each) for each in given[::6] if each is not None)) >= 2**31,
        "PARTIALS": parts,
        "PT": pt,
        "PH": ph,
        "PW": pw,
    }
    units = places // shared["ALIGN"]
    past_weights = (*step.weights[2:], 0.0, 0.0, 0.0)[:3]
    elements = config.elements if seeds is None else config.drawn_elements
    tile = _tile(elements, channels, patch is not None)
    programs = batch * triton.cdiv(channels, tile["CHANNELS"]) * triton.cdiv(places, tile["PLACES"])
    with on_device(sample):
        if sums is not None:
            sum_tile = _tile(config.sum_elements, channels, patch is not None)
            denoise_sums[(batch * parts,)](
                sums, *outputs, channels, units, height, width, **sum_tile, **shared, num_warps=config.sum_warps
            )
        denoise_advance[(programs,)](
            following, target, sums, seeds, *given, channels, units, height, width, step.offset,
            step.guidance, step.rescale, *step.convert, *step.weights[:2], *past_weights, noise_weight, *known_weights,
            **tile, **shared, STAR=step.zero_star, RESCALE=step.rescale != 0, num_warps=config.warps,
        )  # fmt: skip
    return following, target


# Compiled ahead of time.

TENSORS = ("sample", "output", "uncond", "past", "older", "oldest", "noise", "known", "generated")


def specializations() -> Iterator[Specialization]:
    """List the kernels for Wan: the steps that are measured, from tokens in bf16 and from latents in fp32."""
    tokens, latents = ((1, 2, 2), "*bf16"), ((0, 0, 0), "*fp32")
    yield from (_advance("euler", number, tokens, ("uncond",), {}) for number in range(len(CONFIGS)))
    yield _advance("euler/latents", 0, latents, ("uncond",), {})
    yield _advance("unipc", 0, tokens, ("uncond", "past", "older"), {})
    yield _advance("unipc/latents", 0, latents, ("uncond", "past", "older"), {})
    yield _advance("blend", 0, tokens, ("uncond", "past", "older", "noise", "known", "generated"), {})
    yield _advance("blend/seeds", 0, tokens, ("uncond", "past", "known", "generated", "seeds"), {})
    yield _advance("blend/seeds/latents", 0, latents, ("uncond", "past", "known", "generated", "seeds"), {})
    yield _advance("rescale", 0, tokens, ("uncond",), {"STAR": True, "RESCALE": True})
    for kind, (patch, output) in (("tokens", tokens), ("latents", latents)):
        for number, config in enumerate(CONFIGS):
            types, constants = _types(denoise_sums, output, ("uncond",), patch)
            constants |= _tile(config.sum_elements, 16, kind == "tokens")
            options = {"num_warps": config.sum_warps}
            yield Specialization(f"sums/{kind}/{number}", denoise_sums, types, constants, options, ("height", "width"))
    yield from _philox.specializations()


def _advance(
    name: str, number: int, outputs: tuple[tuple[int, ...], str], given: tuple[str, ...], flags: dict[str, bool]
) -> Specialization:
    patch, output = outputs
    config = CONFIGS[number]
    types, constants = _types(denoise_advance, output, given, patch)
    elements = config.drawn_elements if "seeds" in given else config.elements
    constants |= _tile(elements, 16, patch[0] > 0) | {"STAR": False, "RESCALE": False} | flags
    if not flags:
        constants["sums_ptr"] = None
    unaligned = ("height", "width", "offset")
    return Specialization(
        f"advance/{name}/{number}", denoise_advance, types, constants, {"num_warps": config.warps}, unaligned
    )


def _types(
    kernel: Any, output: str, given: tuple[str, ...], patch: tuple[int, ...]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the types of a kernel's arguments and the constants that stand for absent tensors and for flat axes."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = dict(zip(("PT", "PH", "PW"), patch, strict=True))
    constants |= {"ALIGN": 16, "LONG": False, "PARTIALS": MOST_PARTIALS}
    special = {"output": output, "uncond": output, "generated": "*i1", "seeds": "*i64", "sums": "*fp64"}
    integers = ("channels", "place_units", "height", "width", "offset")
    for arg in kernel.arg_names:
        stem, _, kind = arg.rpartition("_")
        if kind == "ptr":
            types[arg] = special.get(stem, "*fp32")
        else:
            types[arg] = "i32" if arg in integers or kind in ("b", "c", "t", "h", "w") else "fp32"
        if stem in (*TENSORS, "seeds") and kind in ("ptr", "b", "c", "t", "h", "w"):
            tokens = stem in ("output", "uncond") and patch[0] > 0
            if stem not in ("sample", "output", *given) or kind in (("h", "w") if tokens else ("t", "h", "w")):
                constants[arg] = None
            elif tokens and kind == "c":
                constants[arg] = 1
    return types, constants
