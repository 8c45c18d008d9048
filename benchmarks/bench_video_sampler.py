"""Samples of the shipped video model in one CUDA graph: stattn's attention beside PyTorch's.

    python -m pytest benchmarks/bench_video_sampler.py --results benchmarks/results/h200

Rows video_sampler/<clips>/<text>/stattn: milliseconds of a sample, beside the fastest of PyTorch's kernels in the same
graph, where all but attention is the same. <text>: "captions" of unequal lengths, which PyTorch is given as a bias made
once, or "full", where every place of the text is taken and nothing is masked. Behind a row stands snr, of the video to
that of the same model in fp32, beside that of PyTorch's attention.
"""

from __future__ import annotations

import copy
import sys
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stattn import dit, masks, results, world
from stattn.bench import runs
from stattn.bench.models import relative_error
from stattn.dit import DiT
from stattn.graph import SampleGraph
from stattn.modules import SpaceTimeAttention
from stattn.ops.qk_norm_rope import qk_norm_rope
from stattn.sampler import sample
from stattn.trainer import attention_bias

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
STEPS = 30


def with_sdpa(model: DiT, backend: SDPBackend) -> DiT:
    """Copy a model whose attention is then PyTorch's, by one of its kernels."""
    twin = copy.deepcopy(model)
    held: dict[str, Tensor] = {}
    for module in twin.modules():
        if isinstance(module, SpaceTimeAttention):
            module.forward = partial(_attend, module, backend, held)  # type: ignore[method-assign]
    return twin


def _attend(
    self: SpaceTimeAttention,
    backend: SDPBackend,
    held: dict[str, Tensor],
    x: Tensor,
    grid: Any,
    *,
    rope: Any = None,
    valid: Tensor | None = None,
    mask: Any = None,
    cache: None = None,
) -> Tensor:
    q, k, v = (proj(x).unflatten(-1, (self.heads, self.head_dim)) for proj in (self.to_q, self.to_k, self.to_v))
    assert self.norm_q is not None
    assert self.norm_k is not None
    q, k = qk_norm_rope(q, k, self.norm_q.weight, self.norm_k.weight, rope, eps=self.eps, interleaved=self.interleaved)
    if valid is not None and "bias" not in held:
        held["bias"] = attention_bias(masks.full().allowed(grid).to(x.device), grid, valid, x.dtype)
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=held.get("bias")
        )
    return self.to_out[0](out.transpose(1, 2).flatten(2))


@pytest.mark.gpu
@pytest.mark.parametrize("text", ["captions", "full"])
@pytest.mark.parametrize("clips", [1, 8, 32])
def test_video_sampler(benchmark: Any, report: results.Report, device: str, clips: int, text: str) -> None:
    benchmark.pedantic(measure, args=(report, device, clips, text), rounds=1, iterations=1)


def measure(report: results.Report, device: str, clips: int, text: str, steps: int = STEPS) -> None:
    """Measure one size."""
    exact = dit.load("tiny", device=device)
    model = dit.load("tiny", dtype=torch.bfloat16, device=device)
    scene = world.sample(clips, seed=3, device=device)
    ids, valid = scene.tokens(model.config.text_len)
    shape = (clips, 3, scene.frames, scene.height, scene.width)
    options: dict[str, Any] = {"text": ids, "steps": steps, "guidance": 1.5, "seed": 3}
    options |= {"text_valid": valid} if text == "captions" else {"negative": ids.flip(1)}
    truth = sample(exact, shape, **options)

    contenders = {"stattn": model} | {f"sdpa-{name}": with_sdpa(model, each) for name, each in BACKENDS.items()}
    graphs: dict[str, SampleGraph] = {}
    for name, each in contenders.items():
        try:
            graphs[name] = SampleGraph(each, shape, **options)
        except RuntimeError as error:  # not every kernel of PyTorch takes a bias
            print(f"{clips} clips, {text}: {name}: {str(error)[:120]}", file=sys.stderr)
            if name == "stattn":
                raise
    errors = {name: relative_error(graph(seed=3), truth) for name, graph in graphs.items()}
    timings = results.time_contenders({name: graph.replay for name, graph in graphs.items()}, device=device, rounds=20)
    best = min((name for name in graphs if name != "stattn"), key=lambda name: timings[name].median)
    # Rounding is amplified by the steps alike, whoever computes attention.
    if not errors["stattn"] <= 1.5 * errors[best] + 1e-3:
        raise runs.WrongResult(
            f"stattn's video is {errors['stattn']:.2e} from that of fp32, {best}'s {errors[best]:.2e}"
        )
    row = f"video_sampler/{clips}/{text}"
    report.results.append(
        results.Result.of(f"{row}/stattn", timings["stattn"], baseline=(best, timings[best]), checked=True)
    )
    runs.add(
        report,
        f"{row}/stattn/snr",
        "dB",
        runs.decibels(errors["stattn"]),
        (best, runs.decibels(errors[best])),
    )
    told = ", ".join(f"{name} {timings[name].median:.2f} ms ({errors[name]:.1e})" for name in graphs)
    print(f"{clips} clips, {text}: {told}", file=sys.stderr, flush=True)
