"""qk_norm_rope at Wan's sizes, beside its compiled reference, compiled diffusers code and a copy of the same bytes.

    python -m pytest benchmarks/bench_qk_norm_rope.py --results benchmarks/results/h200
    python -m benchmarks.bench_qk_norm_rope --tune          # on a GPU: every CONFIG, as a table

Names are ops/<operation>/<fwd|bwd>/<shape> as in ``bench_ops``: qk_norm_rope, in place qk_norm_rope_, and
qk_norm_rope-compiled, -diffusers and -copy. Of the bytes of the copy only q, k and their gradients count.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.bench_ops import copier, on_a_stream, skip_unless_measured, time_and_record, touch
from stattn import results
from stattn.grid import Grid
from stattn.ops.qk_norm_rope import qk_norm_rope, qk_norm_rope_
from stattn.reference import qk_norm_rope as reference
from stattn.rope import RopeTables, rope_tables


class Shape(NamedTuple):
    """The tokens and heads of a model."""

    grid: Grid
    heads: int
    dim: int


GPU_SHAPES = {
    "wan-14b-720p": Shape(Grid(21, 45, 80), 40, 128),
    "wan-1.3b-480p": Shape(Grid(21, 30, 52), 12, 128),
}
CPU_SHAPES = {"tiny": Shape(Grid(8, 8, 8), 6, 64)}
CASES = [
    pytest.param(name, device, id=name, marks=marks)
    for device, shapes, marks in (("cpu", CPU_SHAPES, ()), ("cuda", GPU_SHAPES, (pytest.mark.gpu,)))
    for name in shapes
]
EPS = 1e-6

Call = Callable[..., tuple[Tensor, Tensor]]


def draw(shape: Shape, device: str, copies: int, grad: bool = False) -> tuple[list[list[Tensor]], RopeTables]:
    """Random fused QKV buffers and weights as Wan's, bf16 on a GPU and fp32 on a CPU, and the tables."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    weights = [1 + torch.randn(shape.heads * shape.dim, device=device, dtype=dtype) / 10 for _ in range(2)]
    given = []
    for _ in range(copies):
        q, k = (torch.randn(1, shape.grid.tokens, shape.heads, shape.dim, device=device, dtype=dtype) for _ in range(2))
        given.append([x.detach().requires_grad_(grad) for x in (q, k, *weights)])
    return given, rope_tables(shape.grid, shape.dim, device=device)


def ours(rope: RopeTables) -> Call:
    return lambda q, k, q_weight, k_weight: qk_norm_rope(q, k, q_weight, k_weight, rope, across_heads=True, eps=EPS)


def plain(rope: RopeTables) -> Call:
    """The reference, to be compiled."""
    return lambda q, k, q_weight, k_weight: reference.qk_norm_rope(
        q, k, q_weight, k_weight, rope, rope, True, EPS, True
    )


def diffusers_code(rope: RopeTables) -> Call | None:
    """RMSNorm of PyTorch and the rotation of diffusers, with its angles for every token; None without diffusers."""
    if importlib.util.find_spec("diffusers") is None:
        return None
    from diffusers.models.embeddings import apply_rotary_emb

    cos, sin = (each.repeat_interleave(2, dim=-1) for each in reference.token_angles(rope))

    def call(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
        q_out, k_out = (
            apply_rotary_emb(
                torch.nn.functional.rms_norm(x.flatten(2), weight.shape, weight, EPS).view_as(x),
                (cos, sin),
                sequence_dim=1,
            )
            for x, weight in ((q, q_weight), (k, k_weight))
        )
        return q_out, k_out

    return call


def contenders(rope: RopeTables, device: str) -> dict[str, Call]:
    """The functional operation and, on a GPU, what compilation makes of it."""
    calls = {"qk_norm_rope": ours(rope)}
    if device == "cuda":
        torch.compiler.reset()
        # A backward that is run again and again may not reuse the memory of what was kept for it.
        torch._functorch.config.donated_buffer = False
        others = {"compiled": plain(rope), "diffusers": diffusers_code(rope)}
        calls |= {
            f"qk_norm_rope-{name}": torch.compile(call, fullgraph=True, dynamic=False)
            for name, call in others.items()
            if call is not None
        }
    return calls


def assert_close(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """Compare with the reference; diffusers' code rounds once more, between norm and rotation."""
    for number, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        error = (mine.float() - theirs.float()).square().mean().sqrt() / theirs.float().square().mean().sqrt()
        assert error < 4 * torch.finfo(torch.bfloat16).eps, f"tensor {number}: relative error {error:.2e}"


def bytes_moved(shape: Shape, passes: int, device: str) -> int:
    """Return the bytes of ``passes`` walks over q and k."""
    return 2 * passes * shape.grid.tokens * shape.heads * shape.dim * (2 if device == "cuda" else 4)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_forward(benchmark: Any, report: results.Report, device: str, name: str, kind: str) -> None:
    skip_unless_measured(device, kind)
    shape = (GPU_SHAPES | CPU_SHAPES)[name]
    size = bytes_moved(shape, 2, device)
    copies = results.copies_for(size) if device == "cuda" else 2
    given, rope = draw(shape, device, copies)
    with torch.no_grad():
        calls = contenders(rope, device)
        want = plain(rope)(*given[0])
        for call in calls.values():
            assert_close(call(*given[0]), want)
        fused = [torch.stack((q, k, k), dim=2) for q, k, _, _ in given]
        weights = given[0][2:]

        def in_place(copy: int) -> Tensor:
            return qk_norm_rope_(fused[copy], *weights, rope, across_heads=True, eps=EPS)

        assert_close(in_place(0).unbind(2)[:2], want)
        del want
        timed: dict[str, Callable[[int], Any]] = {
            f"ops/{each}/fwd/{name}": (lambda copy, call=call: call(*given[copy])) for each, call in calls.items()
        }
        timed[f"ops/qk_norm_rope_/fwd/{name}"] = in_place
        time_and_record(report, timed, f"qk_norm_rope/fwd/{name}", size, copies, device)
        touch(benchmark, lambda: calls["qk_norm_rope"](*given[0]), device)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_backward(benchmark: Any, report: results.Report, device: str, name: str, kind: str) -> None:
    skip_unless_measured(device, kind)
    shape = (GPU_SHAPES | CPU_SHAPES)[name]
    size = bytes_moved(shape, 3, device)
    copies = results.copies_for(size) if device == "cuda" else 2
    with on_a_stream(device):
        given, rope = draw(shape, device, copies, grad=True)
        calls = contenders(rope, device)
        outs = {each: [call(*tensors) for tensors in given] for each, call in calls.items()}
        douts = [tuple(torch.randn_like(out) for out in each) for each in outs["qk_norm_rope"]]

        def backward(each: str, copy: int) -> tuple[Tensor, ...]:
            return torch.autograd.grad(outs[each][copy], given[copy], douts[copy], retain_graph=True)

        want = torch.autograd.grad(plain(rope)(*given[0]), given[0], douts[0])
        for each in calls:
            assert_close(backward(each, 0), want)
        del want
        timed = {f"ops/{each}/bwd/{name}": (lambda copy, each=each: backward(each, copy)) for each in calls}
        time_and_record(report, timed, f"qk_norm_rope/bwd/{name}", size, copies, device)
        touch(benchmark, lambda: backward("qk_norm_rope", 0), device)


def tune() -> None:
    """Time every CONFIG, forward and backward, and print its share of the copy rate."""
    from stattn.kernels import qk_norm_rope as kernels
    from stattn.kernels import qk_norm_rope_bwd

    print("| pass | shape | config | us | of copy |\n|---|---|---|---:|---:|")
    for name, shape in GPU_SHAPES.items():
        copies = results.copies_for(bytes_moved(shape, 2, "cuda"))
        given, rope = draw(shape, "cuda", copies)
        angles = kernels.Angles(rope.t, rope.h, rope.w, 0)
        outs = [[torch.empty_like(x) for x in each[:2]] for each in given]
        douts = [[torch.randn_like(x) for x in each[:2]] for each in given]
        rest = (angles, angles, True, EPS, True)

        def forward(config: Any, copy: int, given: Any = given, outs: Any = outs, rest: Any = rest) -> None:
            kernels.forward(*given[copy][:2], *outs[copy], *given[copy][2:], *rest, config)

        def backward(config: Any, copy: int, given: Any = given, douts: Any = douts, rest: Any = rest) -> Any:
            return qk_norm_rope_bwd.backward(*douts[copy], *given[copy], *rest, True, True, config)

        kinds: tuple[tuple[str, int, Callable[..., Any], tuple[Any, ...]], ...] = (
            ("fwd", 2, forward, kernels.CONFIGS),
            ("bwd", 3, backward, qk_norm_rope_bwd.CONFIGS),
        )
        for label, passes, call, configs in kinds:
            size = bytes_moved(shape, passes, "cuda")
            timed: dict[str, Callable[[int], Any]] = {str(config): partial(call, config) for config in configs}
            timings = results.time_in_graph({**timed, "copy": copier(size, copies, "cuda")}, copies=copies)
            for config, timing in timings.items():
                share = timings["copy"].median / timing.median
                print(f"| {label} | {name} | {config} | {timing.median * 1e3:.1f} | {share:.1%} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=tune.__doc__)
    parser.add_argument("--tune", action="store_true", required=True, help="what to do")
    parser.parse_args()
    tune()
