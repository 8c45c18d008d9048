"""Patchify and unpatchify beside PyTorch's ways to do the same, on the same tensors, round by round.

    python -m pytest benchmarks/bench_patchify.py --results benchmarks/results/h200
    python -m benchmarks.bench_patchify --tune          # on a GPU: every CONFIG of every kernel, as a table

Names are patchify/<fwd|bwd>/<shape> for this package, patchify/<other>/<fwd|bwd>/<shape> for the others: conv3d is
nn.Conv3d (without the transposition to tokens that a model needs behind it), linear is reshape, permute and nn.Linear,
compiled is the reference under torch.compile, fill is ``zero_`` of the tokens, which is most of what the latents take,
and copy is ``copy_`` of the same number of bytes, half read and half
written. Outputs are compared with float64 before anything is timed. Bytes are the least that can be moved: every input
and output once.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stattn import results
from stattn.ops.patchify import patchify3d, unpatchify3d
from stattn.reference.patchify import patchify3d as reference


class Shape(NamedTuple):
    """A video and what it is projected to."""

    channels: int
    size: tuple[int, int, int]
    patch: tuple[int, int, int]
    features: int

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along t, h and w."""
        t, h, w = (n // p for n, p in zip(self.size, self.patch, strict=True))
        return t, h, w

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return math.prod(self.grid)

    @property
    def taps(self) -> int:
        """Values of a patch."""
        return self.channels * math.prod(self.patch)

    @property
    def moved(self) -> int:
        """Values read and written by a forward: video, weight, bias and tokens."""
        return self.tokens * (self.taps + self.features) + (self.taps + 1) * self.features

    @property
    def flops(self) -> int:
        """Floating-point operations of the projection."""
        return 2 * self.tokens * self.taps * self.features


GPU_SHAPES = {
    "wan-14b-latent": Shape(16, (21, 90, 160), (1, 2, 2), 5120),
    "wan-1.3b-latent": Shape(16, (21, 60, 104), (1, 2, 2), 1536),
    "pixels_4x16x16_256": Shape(3, (64, 256, 256), (4, 16, 16), 1536),
}
CPU_SHAPES = {"tiny-latent": Shape(16, (4, 16, 16), (1, 2, 2), 256)}


class Problem(NamedTuple):
    """Tensors of one shape, one set for each buffer that is rotated over."""

    x: list[Tensor]
    weight: Tensor
    bias: Tensor
    dout: list[Tensor]


def problem(shape: Shape, device: str, copies: int) -> Problem:
    """Random tensors: bf16 on a GPU, fp32 on a CPU."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype, generator=generator)

    return Problem(
        [draw(1, shape.channels, *shape.size) for _ in range(copies)],
        draw(shape.features, shape.channels, *shape.patch) / math.sqrt(shape.taps),
        draw(shape.features),
        [draw(1, shape.tokens, shape.features) for _ in range(copies)],
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor, shape: Shape) -> Tensor:
    """Cut patches by reshape and permute, and project them by a matrix product."""
    (t, h, w), (pt, ph, pw) = shape.grid, shape.patch
    patches = x.view(x.shape[0], shape.channels, t, pt, h, ph, w, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return F.linear(patches.reshape(x.shape[0], shape.tokens, shape.taps), weight.flatten(1), bias)


def conv3d(x: Tensor, weight: Tensor, bias: Tensor, shape: Shape) -> Tensor:
    """The convolution as models write it, its result left as [B, E, t, h, w]."""
    return F.conv3d(x, weight, bias, stride=shape.patch)


def assert_right(out: Tensor, given: Problem, shape: Shape) -> None:
    """Compare sampled tokens, the first and the last with float64, and refuse more than rounding explains."""
    if out.dim() == 5:
        out = out.flatten(2).transpose(1, 2)
    chosen = torch.randperm(shape.tokens, generator=torch.Generator().manual_seed(1))[:256]
    chosen = torch.cat([chosen, torch.tensor([0, shape.tokens - 1])]).to(out.device)
    t, h, w = (each.to(out.device) for each in torch.unravel_index(chosen, shape.grid))
    x = given.x[0][0].double()
    for axis, p in enumerate(shape.patch):
        x = x.unfold(axis + 1, p, p)
    patches = x[:, t, h, w].transpose(0, 1).flatten(1)  # [C, t, h, w, pt, ph, pw] at the chosen places
    want = patches @ given.weight.double().flatten(1).T + given.bias.double()
    error = (out[0, chosen].double() - want).square().mean().sqrt() / want.square().mean().sqrt()
    slack = 1 if out.dtype == torch.bfloat16 else 8  # float32 sums of many terms round on the way, too
    assert error < slack * torch.finfo(out.dtype).eps, f"relative error {error:.2e}"


def record(
    report: results.Report, timings: dict[str, results.Timing], name: str, moved: int, flops: int | None
) -> None:
    """Record the timings of one shape beside its copy, and the rates of this package's kernel."""
    copy = next(each for each in timings if "/copy/" in each)
    for each, timing in timings.items():
        baseline = None if each == copy else (copy, timings[copy])
        report.results.append(results.Result.of(each, timing, baseline=baseline, checked=True))
    scaled = [("bandwidth", "TB/s", moved * 1e-9)]
    if flops is not None:
        scaled.append(("rate", "TFLOP/s", flops * 1e-9))
    for label, unit, scale in scaled:
        timing = timings[name]
        rates = scale / timing.median, scale / timing.p80, scale / timing.p20
        report.results.append(results.Result(f"{name}/{label}", unit, *rates, None, None, True))


def touch(benchmark: Any, call: Callable[[], Any], device: str) -> None:
    """Give pytest-benchmark its own table; its clock is the host's, so the call waits."""

    def run() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=3, iterations=1)


def copier(size: int, copies: int, device: str) -> Callable[[int], Any]:
    """A copy that moves ``size`` bytes, half of them read."""
    source = [torch.randint(0, 256, (size // 2,), dtype=torch.uint8, device=device) for _ in range(copies)]
    target = [torch.empty_like(each) for each in source]
    return lambda copy: target[copy].copy_(source[copy])


SHAPES = [
    *(pytest.param(name, shape, "cpu", id=name) for name, shape in CPU_SHAPES.items()),
    *(pytest.param(name, shape, "cuda", id=name, marks=pytest.mark.gpu) for name, shape in GPU_SHAPES.items()),
]


def skip_unless_measured(here: str, there: str) -> None:
    if here != there:
        pytest.skip(f"measures the {there.upper()}, this machine measures the {here.upper()}")


@pytest.mark.parametrize(("name", "shape", "kind"), SHAPES)
def test_forward(benchmark: Any, report: results.Report, device: str, name: str, shape: Shape, kind: str) -> None:
    skip_unless_measured(device, kind)
    size = shape.moved * (2 if device == "cuda" else 4)
    copies = results.copies_for(size) if device == "cuda" else 2
    given = problem(shape, device, copies)
    torch.backends.cudnn.benchmark = True  # cuDNN's best algorithm, not its guess
    compiled = torch.compile(reference)
    weight, bias = given.weight, given.bias
    contenders: dict[str, Callable[[int], Any]] = {
        f"patchify/fwd/{name}": lambda copy: patchify3d(given.x[copy], weight, bias),
        f"patchify/conv3d/fwd/{name}": lambda copy: conv3d(given.x[copy], weight, bias, shape),
        f"patchify/linear/fwd/{name}": lambda copy: linear(given.x[copy], weight, bias, shape),
    }
    if device == "cuda":
        contenders[f"patchify/compiled/fwd/{name}"] = lambda copy: compiled(given.x[copy], weight, bias, None)
    with torch.no_grad():
        for call in contenders.values():
            assert_right(call(0), given, shape)
        contenders[f"patchify/copy/fwd/{name}"] = copier(size, copies, device)
        contenders[f"patchify/fill/fwd/{name}"] = lambda copy: given.dout[copy].zero_()
        timings = results.time_in_graph(contenders, copies=copies, device=device)
        record(report, timings, f"patchify/fwd/{name}", size, shape.flops)
        touch(benchmark, lambda: contenders[f"patchify/fwd/{name}"](0), device)


@pytest.mark.parametrize(("name", "shape", "kind"), SHAPES)
def test_backward(benchmark: Any, report: results.Report, device: str, name: str, shape: Shape, kind: str) -> None:
    """dx reads the tokens' gradient and the weight, dweight the gradient and the video: each what a forward moves."""
    skip_unless_measured(device, kind)
    size = 2 * shape.moved * (2 if device == "cuda" else 4)
    copies = results.copies_for(size) if device == "cuda" else 2
    given = problem(shape, device, copies)
    weight, bias = given.weight.requires_grad_(), given.bias.requires_grad_()
    leaves = [each.requires_grad_() for each in given.x]
    torch.backends.cudnn.benchmark = True
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        f"patchify/bwd/{name}": lambda x: patchify3d(x, weight, bias),
        f"patchify/conv3d/bwd/{name}": lambda x: conv3d(x, weight, bias, shape),
        f"patchify/linear/bwd/{name}": lambda x: linear(x, weight, bias, shape),
    }
    stream = torch.cuda.Stream() if device == "cuda" else None  # of the forward, the backward and its capture
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        contenders: dict[str, Callable[[int], Any]] = {}
        found = []
        for label, way in ways.items():
            outs = [way(x) for x in leaves]
            douts = given.dout
            if outs[0].dim() == 5:
                douts = [each.transpose(1, 2).contiguous().view(outs[0].shape) for each in douts]

            def backward(copy: int, outs: list[Tensor] = outs, douts: list[Tensor] = douts) -> tuple[Tensor, ...]:
                return torch.autograd.grad(outs[copy], (leaves[copy], weight, bias), douts[copy], retain_graph=True)

            contenders[label] = backward
            found.append(backward(0))
        ours = found[0]
        dbias = given.dout[0][0].double().sum(0)
        assert (ours[2].double() - dbias).norm() < 4e-3 * dbias.norm()
        for other in found[1:]:  # three independent ways
            for a, b in zip(ours[:2], other[:2], strict=True):
                error = (a.double() - b.double()).norm() / b.double().norm()
                assert error < 8e-3, f"relative difference {error:.2e}"
        contenders[f"patchify/copy/bwd/{name}"] = copier(size, copies, device)
        timings = results.time_in_graph(contenders, copies=copies, device=device, rounds=10)
        record(report, timings, f"patchify/bwd/{name}", size, 2 * shape.flops)
        touch(benchmark, lambda: contenders[f"patchify/bwd/{name}"](0), device)


@pytest.mark.parametrize(("name", "shape", "kind"), SHAPES)
def test_unpatchify(benchmark: Any, report: results.Report, device: str, name: str, shape: Shape, kind: str) -> None:
    skip_unless_measured(device, kind)
    size = 2 * shape.tokens * shape.taps * (2 if device == "cuda" else 4)
    copies = results.copies_for(size) if device == "cuda" else 2
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tokens = [torch.randn(1, shape.tokens, shape.taps, device=device, dtype=dtype) for _ in range(copies)]

    def call(copy: int, impl: str) -> Tensor:
        return unpatchify3d(tokens[copy], shape.grid, shape.patch, shape.channels, impl=impl)

    contenders: dict[str, Callable[[int], Any]] = {
        f"unpatchify/fwd/{name}": lambda copy: call(copy, "auto"),
        f"unpatchify/permute/fwd/{name}": lambda copy: call(copy, "reference"),
    }
    (t, h, w), (pt, ph, pw) = shape.grid, shape.patch
    cells = tokens[0][0].view(t, h, w, pt, ph, pw, shape.channels)
    want = torch.einsum("thwabcd->dtahbwc", cells).reshape(shape.channels, *shape.size)
    for each in contenders.values():
        assert torch.equal(each(0)[0], want)
    contenders[f"unpatchify/copy/fwd/{name}"] = copier(size, copies, device)
    timings = results.time_in_graph(contenders, copies=copies, device=device)
    record(report, timings, f"unpatchify/fwd/{name}", size, None)
    touch(benchmark, lambda: contenders[f"unpatchify/fwd/{name}"](0), device)


# Tuning.


def tune(name: str, shape: Shape) -> None:
    """Time every CONFIG of the kernels on one shape and print a line for each."""
    from stattn.kernels import patchify as forward
    from stattn.kernels import patchify_bwd as backward
    from stattn.kernels import unpatchify
    from stattn.kernels._patches import Geometry

    bf16 = torch.bfloat16

    def show(label: str, size: int, calls: dict[str, Callable[[int], Any]], copies: int, flops: int | None) -> None:
        calls = {**calls, "copy": copier(size, copies, "cuda")}
        with torch.no_grad():
            timings = results.time_in_graph(calls, copies=copies, device="cuda", rounds=10)
        for call, timing in timings.items():
            rate = "" if flops is None or call == "copy" else f" {flops / timing.median * 1e-9:4.0f} TFLOP/s"
            ratio = timings["copy"].median / timing.median
            line = f"{timing.median * 1e3:8.1f} us {size / timing.median * 1e-9:5.2f} TB/s {ratio:5.2f} of copy{rate}"
            print(f"{label}/{name:20} {line}  {call}", flush=True)

    def project(copy: int, config: forward.Config) -> Tensor:
        return forward.forward(given.x[copy], given.weight, given.bias, None, config)

    def dx(copy: int, config: backward.Config) -> Tensor:
        return backward.dx(given.dout[copy], given.weight, shape.size, config)

    def dweight(copy: int, config: backward.Config) -> tuple[Tensor, Tensor]:
        return backward.dweight(given.dout[copy], given.x[copy], shape.patch, bf16, config)

    def move(copy: int, values: int) -> Tensor:
        return unpatchify.forward(tokens[copy], 0, shape.patch, shape.channels, shape.size, values)

    size = 2 * shape.moved
    copies = results.copies_for(size)
    given = problem(shape, "cuda", copies)
    geometry = Geometry.of(tuple(given.x[0].shape), given.x[0].stride(), shape.patch, 2)
    configs = forward.CONFIGS[forward.kernel_for(geometry, bf16)]
    for config in configs:
        assert_right(project(0, config), given, shape)
    show("fwd", size, {str(each): partial(project, config=each) for each in configs}, copies, shape.flops)
    for kind, run in (("dx", dx), ("dweight", dweight)):
        several = backward.CONFIGS[backward.kernel_for(kind, shape.taps, bf16)]
        show(kind, size, {str(each): partial(run, config=each) for each in several}, copies, shape.flops)
    size = 4 * shape.tokens * shape.taps
    copies = results.copies_for(size)
    tokens = [torch.randn(1, shape.tokens, shape.taps, device="cuda").bfloat16() for _ in range(copies)]
    calls = {f"{each} values": partial(move, values=each) for each in unpatchify.CONFIGS}
    show("unpatchify", size, calls, copies, None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", required=True, help="what to do")
    parser.parse_args()
    for name, shape in GPU_SHAPES.items():
        tune(name, shape)
