"""Transformers of diffusers with stattn's attention beside what they run by themselves, with the same random weights.

    python -m pytest benchmarks/bench_diffusers.py --results benchmarks/results/h200

Names are diffusers/<model>/<contender>: Wan 2.1 1.3B at 480p x 81 frames, all layers, its blocks compiled, beside the
same with cuDNN's attention; two blocks of HunyuanVideo 1.5 at 720p x 61 and 121 frames as they come, in time and in
peak memory (.../memory): the original builds a mask of all pairs in each layer, 52 GB with its copies at 121 frames, so
that a smaller card is given 61 alone. Without a GPU, tiny models in fp32.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import stattn
from stattn import masks, results
from stattn.masks import Mask

pytest.importorskip("diffusers")
import diffusers


class Case(NamedTuple):
    """A transformer and a clip: its class and configuration, what it is called with, and its self-attention's grid."""

    name: str
    kind: str
    config: dict[str, Any]
    inputs: Callable[[str, torch.dtype], dict[str, Any]]
    grid: tuple[int, int, int]
    sparse: Mask


def wan_inputs(size: tuple[int, int, int], text: tuple[int, int]) -> Callable[[str, torch.dtype], dict[str, Any]]:
    def make(device: str, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(1, 16, *size, device=device, dtype=dtype),
            "timestep": torch.full((1,), 500.0, device=device),
            "encoder_hidden_states": torch.randn(1, *text, device=device, dtype=dtype),
            "return_dict": False,
        }

    return make


def hunyuan_inputs(size: tuple[int, int, int], texts: tuple[int, int, int], dim: int, image_dim: int) -> Any:
    def make(device: str, dtype: torch.dtype) -> dict[str, Any]:
        first, second, image = texts
        return {
            "hidden_states": torch.randn(1, 65, *size, device=device, dtype=dtype),
            "timestep": torch.full((1,), 500.0, device=device, dtype=dtype),
            "encoder_hidden_states": torch.randn(1, first, dim, device=device, dtype=dtype),
            "encoder_attention_mask": (torch.arange(first, device=device) < first // 4)[None].long(),
            "encoder_hidden_states_2": torch.randn(1, second, 1472, device=device, dtype=dtype),
            "encoder_attention_mask_2": torch.zeros(1, second, dtype=torch.long, device=device),
            "image_embeds": torch.zeros(1, image, image_dim, device=device, dtype=dtype),
            "return_dict": False,
        }

    return make


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
WAN = (
    Case(
        "wan2.1-1.3b-480p",
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
        wan_inputs((21, 60, 104), (512, 4096)),
        (21, 30, 52),
        masks.sliding_tile((3, 8, 8), (3, 2, 3)),
    )
    if ON_GPU
    else Case(
        "wan-tiny",
        "WanTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "ffn_dim": 128, "text_dim": 64},
        wan_inputs((5, 24, 24), (16, 64)),
        (5, 12, 12),
        masks.sliding_tile((2, 4, 4), (2, 1, 1)),
    )
)
TEXTS = 1000 + 256 + 729  # two texts and an image, of HunyuanVideo 1.5
HUNYUAN_TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "rope_axes_dim": (8, 12, 12),
    "text_embed_dim": 32,
    "image_embed_dim": 16,
}


def hunyuan(frames: int) -> Case:
    """Two blocks of HunyuanVideo 1.5 at 720p; tiny without a GPU."""
    grid = ((frames - 1) // 4 + 1, 45, 80) if ON_GPU else (5, 12, 12)
    return Case(
        f"hunyuanvideo-1.5-{'720p' if ON_GPU else 'tiny'}-{frames}-frames-2-blocks",
        "HunyuanVideo15Transformer3DModel",
        {"num_layers": 2} if ON_GPU else HUNYUAN_TINY,
        hunyuan_inputs(grid, *(((1000, 256, 729), 3584, 1152) if ON_GPU else ((16, 8, 4), 32, 16))),
        grid,
        masks.sliding_tile((4, 9, 16), (3, 3, 2)) if ON_GPU else masks.sliding_tile((2, 4, 4), (2, 1, 1)),
    )


def build(case: Case) -> nn.Module:
    """Make a transformer with random weights, in the dtypes in which from_pretrained would load it."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        made: Any = getattr(diffusers, case.kind)(**case.config)
    wide = made._keep_in_fp32_modules or []
    for name, module in made.named_modules():
        if not any(each in name.split(".") for each in wide):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor.data = tensor.data.to(DTYPE)
    for name, parameter in made.named_parameters(recurse=False):
        parameter.data = parameter.data.to(torch.float32 if name in wide else DTYPE)
    found: nn.Module = made.eval().requires_grad_(False)
    return found


def twin(transformer: nn.Module) -> Any:
    """Copy a transformer but for its parameters and buffers, which both then share."""
    kept = {id(each): each for each in (*transformer.parameters(), *transformer.buffers())}
    return copy.deepcopy(transformer, kept)


def compiled(transformer: Any) -> Any:
    """Compile the blocks on a GPU: one graph serves them all."""
    if ON_GPU:
        transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    return transformer


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    difference = (got.double() - want.double()).square().mean().sqrt()
    return float(difference / want.double().square().mean().sqrt())


@torch.no_grad()
def checked(transformer: nn.Module, call: dict[str, Any], mask: Mask | None, contenders: dict[str, Any]) -> None:
    """Compare contenders with the transformer under another implementation of attention, or the original if dense."""
    other = twin(transformer)
    if mask is not None:
        stattn.accelerate(other, mask, impl={"attention": "triton" if ON_GPU else "reference"})
    want = other(**call)[0]
    for name, each in contenders.items():
        found = error(each(**call)[0], want)
        assert found < 8 * torch.finfo(DTYPE).eps, f"{name}: relative error {found:.2e}"


@torch.no_grad()
def test_wan_of_all_layers(benchmark: Any, report: results.Report) -> None:
    case = WAN
    transformer, call = build(case), case.inputs(DEVICE, DTYPE)
    original, full, sparse = (twin(transformer) for _ in range(3))
    stattn.accelerate(full)
    stattn.accelerate(sparse, case.sparse)
    for each in (original, full, sparse):
        if ON_GPU:
            each.set_attention_backend("_native_cudnn")  # of cross-attention in all three
        compiled(each)
    checked(transformer, call, None, {"original": original, "full": full})
    checked(transformer, call, case.sparse, {"sparse": sparse})
    base = f"diffusers/{case.name}/{'cudnn' if ON_GPU else 'original'}"
    contenders = {
        base: original,
        f"diffusers/{case.name}/stattn-full": full,
        f"diffusers/{case.name}/stattn-sliding_tile": sparse,
    }
    calls = {name: lambda each=each: each(**call) for name, each in contenders.items()}
    timings = results.time_contenders(calls, device=DEVICE, rounds=7, warmup=1)
    benchmark.pedantic(lambda: calls[base](), rounds=1, iterations=1)
    report.versions |= {"diffusers": diffusers.__version__}
    report.versions[f"density of {case.name}"] = f"{case.sparse.density(case.grid):.2%}"
    for name, timing in timings.items():
        beside = None if name == base else (base, timings[base])
        report.results.append(results.Result.of(name, timing, baseline=beside, checked=True))


def accelerated(case: Case) -> tuple[dict[str, Callable[[], Any]], str]:
    """Make the original and its accelerated twins, compared with one another. Returns calls by name, and the first."""
    transformer, call = build(case), case.inputs(DEVICE, DTYPE)
    full, sparse = twin(transformer), twin(transformer)
    stattn.accelerate(full)
    stattn.accelerate(sparse, case.sparse)
    checked(transformer, call, None, {"full": full})
    checked(transformer, call, case.sparse, {"sparse": sparse})
    names = {"original": transformer, "stattn-full": full, "stattn-sliding_tile": sparse}
    calls = {f"diffusers/{case.name}/{name}": lambda each=each: each(**call) for name, each in names.items()}
    return calls, f"diffusers/{case.name}/original"


@pytest.mark.parametrize("frames", [61, 121] if ON_GPU else [121])
@torch.no_grad()
def test_two_blocks_of_hunyuanvideo(benchmark: Any, report: results.Report, frames: int) -> None:
    case = hunyuan(frames)
    pairs = (math.prod(case.grid) + TEXTS) ** 2
    if ON_GPU and 4 * pairs + (8 << 30) > torch.cuda.get_device_properties(0).total_memory:
        pytest.skip(f"the original needs some {4 * pairs / 2**30:.0f} GiB for masks at {frames} frames")
    if ON_GPU:
        release()
    calls, base = accelerated(case)
    report.versions |= {
        "diffusers": diffusers.__version__,
        f"density of {case.name}": f"{case.sparse.density(case.grid):.2%}",
    }
    if ON_GPU:
        peaks = {name: peak(each) for name, each in calls.items()}
        for name, value in peaks.items():
            there = None if name == base else results.Baseline(f"{base}/memory", peaks[base])
            ratio = None if name == base else peaks[base] / value
            report.results.append(results.Result(f"{name}/memory", "GiB", value, value, value, there, ratio, True))
    timings = results.time_contenders(calls, device=DEVICE, rounds=3 if frames > 61 else 5, warmup=0)
    benchmark.pedantic(lambda: calls[base](), rounds=1, iterations=1)
    for name, timing in timings.items():
        beside = None if name == base else (base, timings[base])
        report.results.append(results.Result.of(name, timing, baseline=beside, checked=True))


def release() -> None:
    """Give back what the last test's models held, which are cycles, and its free memory, which is in pieces."""
    gc.collect()
    torch.cuda.empty_cache()


def peak(call: Callable[[], Any]) -> float:
    """Give the most memory held at once during a call, weights included, in GiB."""
    torch.cuda.synchronize()
    release()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30
