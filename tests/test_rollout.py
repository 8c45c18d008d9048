"""Autoregressive video: the ring of keys and values, and rollouts against recomputing all frames for every chunk."""

from __future__ import annotations

import pytest
import torch

from stattn import masks
from stattn.cache import RollingKVCache
from stattn.dit import DiT, DiTConfig
from stattn.rollout import rollout
from stattn.sampler import FlowMatching, sample

CROSS = DiTConfig(
    kind="cross", layers=2, heads=2, head_dim=16, ffn_dim=32, in_channels=3, out_channels=3, patch=(1, 2, 2),
    text_dim=8, text_len=5, freq_dim=16,
)  # fmt: skip
JOINT = DiTConfig(
    kind="joint", layers=2, heads=2, head_dim=16, ffn_dim=32, in_channels=3, out_channels=3, patch=(2, 2, 2),
    text_dim=8, text_len=5, freq_dim=16, qk_norm="per_head",
)  # fmt: skip
SIZE = (6, 8)


def model_of(config: DiTConfig, dtype: torch.dtype = torch.float64, device: str = "cpu") -> DiT:
    """A random model without a zero among its parameters, whose text sees text only."""
    model = DiT(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    for block in model.blocks:
        block.attn1.globals_see = "globals"
    return model.to(device, dtype)


def video_and_text(model: DiT, frames: int, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight = model.proj_out.weight
    x = torch.randn(batch, 3, frames, *SIZE, generator=generator).to(weight)
    return x, torch.randn(batch, 5, 8, generator=generator).to(weight)


CACHES = [
    (1, 3, 0),
    (2, 4, 0),
    (2, 4, 1),
    (2, 4, 2),
    (2, 2, 3),
    (3, 3, 0),
    (2, 8, 0),
    (2, 8, 5),
]  # chunk, window, sinks


@pytest.mark.parametrize("config", [CROSS, JOINT], ids=lambda config: config.kind)
@pytest.mark.parametrize("chunk, window, sinks", CACHES)
@torch.no_grad()
def test_chunks_through_a_cache_equal_one_pass_over_all_frames(config, chunk, window, sinks):
    model = model_of(config)
    frames, step = 7, config.patch[0]
    x, text = video_and_text(model, frames * step, batch=2)
    t = torch.tensor([300.0, 700.0])
    mask = masks.frame_causal(chunk, window, sink_frames=sinks)
    want = model(x, t, text, mask=mask)
    assert not torch.allclose(want, model(x, t, text, mask=masks.frame_causal(chunk)), atol=1e-4) or window >= frames
    cache = model.kv_cache(2, SIZE, chunk=chunk, window=window, sinks=sinks, text_len=5)
    for first in range(0, frames, chunk):
        region = cache.open(min(chunk, frames - first))
        part = slice(first * step, (first + region.extent[0]) * step)
        # A first pass on other data: what is written last counts.
        model(torch.randn_like(x[:, :, part]), t, text, cache=cache)
        got = model(x[:, :, part], t, text, cache=cache)
        torch.testing.assert_close(got, want[:, :, part], rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_mask_of_places_joins_what_the_cache_allows():
    model = model_of(CROSS)
    x, text = video_and_text(model, 4)
    t = torch.tensor([300.0])
    near = masks.window(4, 3, 3)
    want = model(x, t, text, mask=masks.frame_causal(1, 2) & near)
    assert (want - model(x, t, text, mask=masks.frame_causal(1, 2))).abs().max() > 1e-4
    cache = model.kv_cache(1, SIZE, chunk=1, window=2)
    for frame in range(4):
        cache.open()
        got = model(x[:, :, frame : frame + 1], t, text, cache=cache, mask=masks.window(1 + frame, 3, 3))
        torch.testing.assert_close(got, want[:, :, frame : frame + 1], rtol=0, atol=1e-10)


def recomputed(model: DiT, noise: torch.Tensor, mask, chunk: int, context: int, **options) -> torch.Tensor:
    """Sample chunk by chunk, with all earlier frames passed through the model again, clean, in every call."""
    done = noise[:, :, :0]
    if context:
        done = options.pop("given")
    while done.shape[2] < noise.shape[2]:
        frames = slice(done.shape[2], min(done.shape[2] + chunk, noise.shape[2]))

        def predict(x, t, text, text_valid=None, done=done):
            past = torch.cat([done] * (len(x) // len(done))).to(x)
            levels = torch.cat((t.new_zeros(len(x), past.shape[2]), t[:, None].expand(-1, x.shape[2])), 1)
            return model(torch.cat((past, x), 2), levels, text, text_valid, mask=mask)[:, :, past.shape[2] :]

        mine = noise[:, :, frames]
        x = sample(
            predict, tuple(mine.shape), noise=mine, dtype=model.proj_out.weight.dtype, device=noise.device, **options
        )
        done = torch.cat((done.to(x), x), 2)
    return done


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("chunk, window, sinks, context", [(2, None, 0, 0), (2, 4, 1, 0), (1, 2, 1, 2), (3, 3, 0, 3)])
def test_a_rollout_equals_recomputing_every_chunk(chunk, window, sinks, context, guidance):
    model = model_of(CROSS)
    x, text = video_and_text(model, 8)
    options = {"text": text, "steps": FlowMatching(3, shift=2.0), "prediction": "v", "guidance": guidance}
    mask = masks.frame_causal(chunk, window or 8, sink_frames=sinks)
    given = x[:, :, :context] if context else None
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    want = recomputed(model, noise, mask, chunk, context, **options, **({"given": given} if context else {}))
    got = rollout(model, x.shape, chunk=chunk, window=window, sinks=sinks, context=given, noise=noise, **options)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
    if context:
        assert torch.equal(got[:, :, :context], given)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, most", [(torch.float32, 2e-4), (torch.bfloat16, 0.06)])
def test_a_rollout_on_a_gpu_is_as_near_to_float64_as_recomputing_is(dtype, most):
    exact = model_of(CROSS)
    x, text = video_and_text(exact, 8)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    options = {"steps": FlowMatching(3, shift=2.0), "prediction": "v"}
    mask = masks.frame_causal(2, 4, sink_frames=1)
    want = recomputed(exact, noise, mask, 2, 0, text=text, **options)
    model = model_of(CROSS, dtype, "cuda")
    text = text.to("cuda", dtype)
    again = recomputed(model, noise.float().cuda(), mask, 2, 0, text=text, **options)
    got = rollout(model, x.shape, chunk=2, window=4, sinks=1, noise=noise.float(), text=text, **options)
    error, eager = ((each.double().cpu() - want).abs().max().item() for each in (got, again))
    assert eager < most  # else nothing is compared
    assert error <= 2 * (eager + torch.finfo(dtype).eps * want.abs().max().item())


def test_the_ring_keeps_the_sinks_and_the_latest_frames_in_place():
    cache = RollingKVCache(1, 1, (1, 1), 1, 2, chunk=2, window=4, sinks=1)
    held = []
    for _ in range(5):
        cache.open()
        held.append(list(cache.held))
        assert cache.frames.tolist() == cache.held
    assert held == [
        [0, 1, -1, -1, -1], [0, 1, 2, 3, -1], [0, 5, 2, 3, 4], [0, 5, 6, 7, 4], [0, 9, 6, 7, 8],
    ]  # fmt: skip


def test_positions_count_frames_or_close_the_gap_behind_the_sinks():
    places = {}
    for rebase in (False, True):
        cache = RollingKVCache(1, 1, (1, 1), 1, 2, chunk=2, window=4, sinks=1, rebase=rebase)
        for _ in range(5):
            cache.open()
        chunk, slots = cache.positions()
        places[rebase] = chunk.tolist(), slots.tolist()
    assert places[False] == ([8, 9], [0, 9, 6, 7, 8])
    assert places[True] == ([3, 4], [0, 4, 1, 2, 3])


def test_attention_does_not_depend_on_where_the_ring_of_a_rebased_cache_is():
    # Relative places are what attention sees: a video without sinks looks the same at any frame of a long rollout.
    model = model_of(CROSS)
    x, text = video_and_text(model, 10)
    t = torch.tensor([500.0])
    outs = []
    with torch.no_grad():
        for skip in (0, 3):
            cache = model.kv_cache(1, SIZE, chunk=1, window=3, rebase=True)
            for frame in (*range(7, 7 + skip), 0, 1, 2, 3, 4, 5):
                cache.open()
                out = model(x[:, :, frame : frame + 1], t, text, cache=cache)
            outs.append(out)
    # Keys of a layer carry what its own window saw: two layers of three frames reach five frames back.
    torch.testing.assert_close(*outs, rtol=0, atol=1e-9)


def test_text_is_encoded_once_and_the_chunks_are_reported():
    model = model_of(CROSS, torch.float32)
    calls = []
    encode = model.encode_text
    model.encode_text = lambda *arguments: calls.append(1) or encode(*arguments)
    done = []
    _, text = video_and_text(model, 5)
    options = {"text": text, "steps": 2, "prediction": "v", "seed": 3, "chunk": 2}
    rollout(model, (1, 3, 5, *SIZE), callback=lambda frames, x: done.append((frames, x.shape[2])), **options)
    assert (len(calls), done) == (1, [(2, 2), (4, 2), (5, 1)])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"chunk": 0}, "chunk=0"),
        ({"window": 3}, "window=3"),
        ({"sinks": -1}, "sinks=-1"),
        ({"context": torch.zeros(1, 3, 3, *SIZE)}, "context has 3 frames"),
        ({"context": torch.zeros(1, 3, 8, *SIZE)}, "context has 8 frames"),
        ({"context": torch.zeros(1, 3, 0, *SIZE)}, "context has 0 frames"),
        ({"context": torch.zeros(1, 3, 6, *SIZE), "chunk": 4}, "context has 6 frames"),
        ({"context": torch.zeros(1, 3, 2, 2, 2)}, "context of shape"),
        ({"noise": torch.zeros(1, 3, 2, *SIZE)}, "noise of shape"),
        ({"noise": torch.zeros(1, 3, 8, *SIZE), "seed": 1}, "noise and seed or generator exclude each other"),
        ({"context": [0.0]}, "context of type list must be a tensor"),
        ({"rebase": 1}, "rebase=1 must be True or False"),
        ({"callback": "print"}, "callback='print' must be a function"),
        ({"batched": False}, "takes no batched"),
        ({"known": torch.zeros(1)}, "takes no known"),
    ],
    ids=str,
)
def test_a_rollout_refuses_by_name(change, message):
    model = model_of(CROSS, torch.float32)
    options = {"chunk": 2, "steps": 1, "prediction": "v", "text": torch.zeros(1, 5, 8)}
    with pytest.raises((ValueError, TypeError), match=message):
        rollout(model, (1, 3, 8, *SIZE), **options | change)


def test_a_rollout_refuses_other_models_and_odd_frames():
    with pytest.raises(TypeError, match="must be a DiT"):
        rollout(torch.nn.Identity(), (1, 3, 8, *SIZE), chunk=2)
    with pytest.raises(ValueError, match="7 frames"):
        rollout(model_of(JOINT), (1, 3, 7, *SIZE), chunk=1)


def test_a_cache_refuses_what_does_not_fit():
    cache = RollingKVCache(1, 1, (2, 2), 1, 2, chunk=2, window=4)
    assert (cache.slots, cache.sinks, cache.after, cache.rebase) == (4, 0, 0, False)
    with pytest.raises(ValueError, match="no chunk is open"):
        cache.layer(0)
    with pytest.raises(ValueError, match="frames=3"):
        cache.open(3)
    cache.open(1)
    with pytest.raises(ValueError, match="k of shape"):
        cache.write(0, torch.zeros(1, 8, 1, 2), torch.zeros(1, 4, 1, 2))
    with pytest.raises(ValueError, match="ended at frame 1"):
        cache.open()
    with pytest.raises(ValueError, match="heads=0"):
        RollingKVCache(1, 1, (2, 2), 0, 2, chunk=2, window=4)
    model = model_of(CROSS, torch.float32)
    other = model.kv_cache(1, SIZE, chunk=2, window=4)
    other.open()
    with pytest.raises(ValueError, match="the chunk that is open"):
        model(torch.zeros(1, 3, 1, *SIZE), torch.zeros(1), torch.zeros(1, 5, 8), cache=other)
