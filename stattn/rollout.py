"""Autoregressive video: chunks of frames sampled one after another, each seeing those before it: ``rollout``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stattn.dit import DiT, EncodedText
from stattn.grid import is_int
from stattn.sampler import Inputs, check_callback, check_shape, make_noise, prepare

# Of `sample`'s keywords those that are of one clip as a whole, or set here.
_NOT_TAKEN = ("known", "generated", "masked_input", "batched", "patch", "callback", "noise", "seed", "generator")


@torch.no_grad()
def rollout(
    model: DiT,
    shape: Sequence[int],
    *,
    chunk: int,
    window: int | None = None,
    sinks: int = 0,
    context: Tensor | None = None,
    rebase: bool = False,
    noise: Tensor | None = None,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    callback: Callable[[int, Tensor], object] | None = None,
    **options: Any,
) -> Tensor:
    """Sample a video chunk by chunk, each attending to the frames before it that `stattn.cache.RollingKVCache` holds.

    shape: (B, C, T, H, W). chunk, window, sinks: numbers of token frames, of which the video has T / pt. Every frame
    sees its own chunk, the latest ``window`` frames and the first ``sinks``, as defined by
    ``masks.frame_causal(chunk, window, sink_frames=sinks)``; window is a multiple of chunk, all frames by default. A
    chunk is sampled from noise with the earlier ones in the cache, then passed through the model once more, clean, at
    the last level's timestep: later chunks see the keys and values of that pass. The result is what recomputing every
    chunk with all earlier frames would give. Text sees text only.

    context: [B, C, frames, H, W], the first chunks, given. rebase: count rotary positions without the gap left by
    frames that were dropped from the cache, for videos longer than the model was trained on. noise, seed, generator: of
    the whole video, as in ``sample``. options: keywords of ``sample`` for each chunk (text, steps, guidance, mask,
    ...); guidance makes both predictions in one call. callback: called after each chunk with the number of frames done
    and the chunk.

    Returns [B, C, T, H, W] in float32 (float64 for a float64 model). Follows Self-Forcing (arXiv:2506.08009).
    Raises TypeError for another model than a DiT and for keywords that a rollout has no use for, ValueError for
    numbers of frames that do not fit.
    """
    if not isinstance(model, DiT):
        raise TypeError(f"model of type {type(model).__name__} must be a DiT")
    unused = [name for name in options if name in _NOT_TAKEN]
    if unused:
        raise TypeError(f"rollout takes no {', '.join(unused)}")
    size = check_shape(shape)
    step = model.config.patch[0]
    if size[2] % step:
        raise ValueError(f"shape={size} has {size[2]} frames, no multiple of the patch's {step}")
    frames = size[2] // step
    if not is_int(chunk) or chunk < 1:
        raise ValueError(f"chunk={chunk!r} must be a positive integer")
    window = -(-frames // chunk) * chunk if window is None else window
    given = _given_frames(context, size, step, chunk)
    noise = make_noise(size, noise, seed, generator)
    check_callback(callback)

    video: list[Tensor] = []
    cache, encoded = None, None
    for first in range(0, frames, chunk):
        count = min(chunk, frames - first)
        part = slice(first * step, (first + count) * step)
        mine = (*size[:2], count * step, *size[3:])
        walk, inputs = prepare(model, mine, noise=noise[:, :, part], masked_input=False, **options)
        if cache is None or encoded is None:
            encoded = walk.encode(inputs)
            [(copies, text, _)] = encoded.passes
            cache = model.kv_cache(
                copies * size[0],
                (size[3], size[4]),
                chunk=chunk,
                window=window,
                sinks=sinks,
                text_len=text.tokens.shape[1] if isinstance(text, EncodedText) else 0,
                rebase=rebase,
            )
        cache.open(count)
        walk = walk.with_keywords(cache=cache)
        if context is not None and first < given:
            x = context[:, :, part].to(inputs.noise)
        else:
            x = walk(Inputs(inputs.noise, encoded.passes, None, None))
        video.append(x)
        if first + count < frames:
            walk.predict(x, walk.levels[-1].timestep, encoded.passes, len(walk.levels) - 2)
        if callback is not None:
            callback((first + count) * step, x)
    return torch.cat(video, dim=2)


def _given_frames(context: Tensor | None, size: tuple[int, ...], step: int, chunk: int) -> int:
    """Return how many frames of tokens are given."""
    if context is None:
        return 0
    if not isinstance(context, Tensor):
        raise TypeError(f"context of type {type(context).__name__} must be a tensor")
    shape = tuple(context.shape)
    if len(shape) != 5 or shape[:2] != size[:2] or shape[3:] != size[3:]:
        raise ValueError(f"context of shape {shape} must be [{size[0]}, {size[1]}, frames, {size[3]}, {size[4]}]")
    if shape[2] % (step * chunk) or not 0 < shape[2] < size[2]:
        raise ValueError(
            f"context has {shape[2]} frames: it must be whole chunks of {step * chunk}, and fewer than {size[2]}"
        )
    return shape[2] // step
