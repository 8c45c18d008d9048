"""Operations around attention beside ``torch.compile`` of their references and beside a copy of the same bytes.

    python -m pytest benchmarks/bench_ops.py --results benchmarks/results/h200
    python -m benchmarks.bench_ops --tune          # on a GPU: every CONFIG of every kernel, as a table

Names are ops/<operation>/<fwd|bwd>/<shape>; with "-compiled" behind the operation for the compiled reference, with
"-diffusers" for what its Wan block computes, compiled, where it is installed, and with "-copy" for ``copy_`` of as many
bytes as the operation must move, half of them read: the baseline, so a ratio is the share of the copy rate. Only
activations are counted. Everything is timed by graph replay over rotating buffers. The backward is timed alone: the
forwards ran before. What is timed is compared with the reference first.

A new operation is an entry of ``OPERATIONS``.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from stattn import results
from stattn.bench import runs
from stattn.ops.gate import gate_residual, gate_residual_modulate
from stattn.ops.modulate import modulate
from stattn.reference import gate as gate_reference
from stattn.reference import modulate as modulate_reference


class Shape(NamedTuple):
    """Tokens and channels of a model."""

    tokens: int
    channels: int


GPU_SHAPES = {"wan-14b-720p": Shape(75_600, 5120), "wan-1.3b-480p": Shape(32_760, 1536)}
CPU_SHAPES = {"tiny": Shape(512, 384)}

Outputs = tuple[Tensor, ...]


class Operation(NamedTuple):
    """An operation to time.

    draw: its tensors for a shape. ours, reference: what computes it from them. forward_passes, backward_passes: how
    many activations of the shape must be read and written.
    """

    draw: Callable[[Shape, str], list[Tensor]]
    ours: Callable[..., Outputs]
    reference: Callable[..., Outputs]
    forward_passes: int
    backward_passes: int


def tensors(activations: int, vectors: int) -> Callable[[Shape, str], list[Tensor]]:
    """Draw activations [1, N, C], bf16 on a GPU and fp32 on a CPU, and fp32 vectors [1, C]."""

    def draw(shape: Shape, device: str) -> list[Tensor]:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        drawn = [torch.randn(1, *shape, device=device, dtype=dtype) for _ in range(activations)]
        return drawn + [torch.randn(1, shape.channels, device=device) / 3 for _ in range(vectors)]

    return draw


LAYER_NORM = ("layer", None, None, 1e-6)
OPERATIONS = {
    "modulate": Operation(
        tensors(1, 2),
        lambda x, scale, shift: (modulate(x, scale, shift),),
        lambda x, scale, shift: (modulate_reference.modulate(x, scale, shift, *LAYER_NORM),),
        forward_passes=2,
        backward_passes=3,
    ),
    "gate_residual": Operation(
        tensors(2, 1),
        lambda x, y, gate: (gate_residual(x, y, gate),),
        lambda x, y, gate: (gate_reference.gate_residual(x, y, gate),),
        forward_passes=3,
        backward_passes=3,
    ),
    "gate_residual_modulate": Operation(
        tensors(2, 3),
        gate_residual_modulate,
        lambda *given: gate_reference.gate_residual_modulate(*given, *LAYER_NORM),
        forward_passes=4,
        backward_passes=6,
    ),
}


def diffusers_code(operation: str, channels: int) -> Callable[..., Outputs] | None:
    """Return what diffusers' Wan block computes, with its norm in float32; None without diffusers."""
    if importlib.util.find_spec("diffusers") is None:
        return None
    from diffusers.models.normalization import FP32LayerNorm

    norm = FP32LayerNorm(channels, LAYER_NORM[3], elementwise_affine=False)

    def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return (norm(x.float()) * (1 + scale[:, None]) + shift[:, None]).type_as(x)

    def gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        return (x.float() + y * gate[:, None]).type_as(x)

    def both(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> Outputs:
        residual = gated(x, y, gate)
        return residual, modulated(residual, scale, shift)

    return {
        "modulate": lambda *given: (modulated(*given),),
        "gate_residual": lambda *given: (gated(*given),),
        "gate_residual_modulate": both,
    }[operation]


def contenders_of(operation: str, channels: int, device: str) -> dict[str, Callable[..., Outputs]]:
    """Return the operation and, on a GPU, what compilation makes of its reference and of diffusers' code."""
    calls = {operation: OPERATIONS[operation].ours}
    if device == "cuda":
        torch.compiler.reset()
        # A backward that is run again and again may not reuse the memory of what was kept for it.
        torch._functorch.config.donated_buffer = False
        others = {"compiled": OPERATIONS[operation].reference, "diffusers": diffusers_code(operation, channels)}
        calls |= {
            f"{operation}-{name}": torch.compile(call, fullgraph=True, dynamic=False)
            for name, call in others.items()
            if call is not None
        }
    return calls


CASES = [
    pytest.param(operation, shape, device, id=f"{operation}-{shape}", marks=marks)
    for device, shapes, marks in (("cpu", CPU_SHAPES, ()), ("cuda", GPU_SHAPES, (pytest.mark.gpu,)))
    for operation in OPERATIONS
    for shape in shapes
]


def skip_unless_measured(here: str, there: str) -> None:
    """Skip the cases of another device."""
    if here != there:
        pytest.skip(f"measures the {there.upper()}, this machine measures the {here.upper()}")


def copier(size: int, copies: int, device: str) -> Callable[[int], Tensor]:
    """Return a copy that moves ``size`` bytes, half of them read."""
    source = torch.randint(0, 256, (copies, size // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda copy: target[copy].copy_(source[copy])


def assert_close(got: Outputs, want: Outputs) -> None:
    """Compare with the reference. Both round to the dtype; the reference rounds gradients between two operations."""
    for number, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        error = (ours.float() - theirs.float()).square().mean().sqrt() / theirs.float().square().mean().sqrt()
        assert error < 4 * torch.finfo(torch.bfloat16).eps, f"tensor {number}: relative error {error:.2e}"


def on_a_stream(device: str) -> Any:
    """Return a context in which autograd runs backwards on the stream that a graph is captured on."""
    return torch.cuda.stream(torch.cuda.Stream() if device == "cuda" else None)


def time_and_record(
    report: results.Report, contenders: dict[str, Callable[[int], Any]], name: str, size: int, copies: int, device: str
) -> None:
    """Time the contenders beside a copy; record each beside it, and the bytes a second behind it."""
    operation, rest = name.split("/", 1)
    copy = f"ops/{operation}-copy/{rest}"
    timed = {**contenders, copy: copier(size, copies, device)}
    timings = results.time_in_graph(timed, copies=copies, device=device)
    for each, timing in timings.items():
        baseline = None if each == copy else (copy, timings[copy])
        report.results.append(results.Result.of(each, timing, baseline=baseline, checked=True))
        runs.add_rate(report, f"{each}/bandwidth", "GB/s", size * 1e-6, timing)


def bytes_moved(case: Operation, backward: bool, shape: Shape, device: str) -> int:
    """Return the bytes that one call reads and writes."""
    passes = case.backward_passes if backward else case.forward_passes
    return passes * shape.tokens * shape.channels * (2 if device == "cuda" else 4)


def touch(benchmark: Any, call: Callable[[], Any], device: str) -> None:
    """Give pytest-benchmark its own table; its clock is the host's, so the call waits."""

    def run() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=3, iterations=1)


@pytest.mark.parametrize(("operation", "shape_name", "kind"), CASES)
def test_forward(
    benchmark: Any, report: results.Report, device: str, operation: str, shape_name: str, kind: str
) -> None:
    skip_unless_measured(device, kind)
    case, shape = OPERATIONS[operation], (GPU_SHAPES | CPU_SHAPES)[shape_name]
    size = bytes_moved(case, False, shape, device)
    copies = results.copies_for(size) if device == "cuda" else 2
    torch.manual_seed(0)
    given = [case.draw(shape, device) for _ in range(copies)]
    calls = contenders_of(operation, shape.channels, device)
    with torch.no_grad():
        want = case.reference(*given[0])
        for call in calls.values():
            assert_close(call(*given[0]), want)
        del want
        contenders = {
            f"ops/{name}/fwd/{shape_name}": (lambda copy, call=call: call(*given[copy])) for name, call in calls.items()
        }
        time_and_record(report, contenders, f"{operation}/fwd/{shape_name}", size, copies, device)
        touch(benchmark, lambda: case.ours(*given[0]), device)


@pytest.mark.parametrize(("operation", "shape_name", "kind"), CASES)
def test_backward(
    benchmark: Any, report: results.Report, device: str, operation: str, shape_name: str, kind: str
) -> None:
    skip_unless_measured(device, kind)
    case, shape = OPERATIONS[operation], (GPU_SHAPES | CPU_SHAPES)[shape_name]
    size = bytes_moved(case, True, shape, device)
    copies = results.copies_for(size) if device == "cuda" else 2
    torch.manual_seed(0)
    with on_a_stream(device):
        given = [[each.requires_grad_() for each in case.draw(shape, device)] for _ in range(copies)]
        calls = contenders_of(operation, shape.channels, device)
        outs = {name: [call(*each) for each in given] for name, call in calls.items()}
        douts = [tuple(torch.randn_like(out) for out in each) for each in outs[operation]]

        def backward(name: str, copy: int) -> Outputs:
            return torch.autograd.grad(outs[name][copy], given[copy], douts[copy], retain_graph=True)

        want = torch.autograd.grad(case.reference(*given[0]), given[0], douts[0])
        for name in calls:
            assert_close(backward(name, 0), want)
        del want
        contenders = {f"ops/{name}/bwd/{shape_name}": (lambda copy, name=name: backward(name, copy)) for name in calls}
        time_and_record(report, contenders, f"{operation}/bwd/{shape_name}", size, copies, device)
        touch(benchmark, lambda: backward(operation, 0), device)


# Tuning.


class Tuned(NamedTuple):
    """A kernel with its CONFIGS: what one call does with one of them, on one copy of its tensors."""

    name: str
    passes: int
    configs: tuple[Any, ...]
    call: Callable[[Any, int], Any]


def tuned(shape: Shape, copies: int) -> Iterator[Tuned]:
    """Yield the kernels that have CONFIGS, on tensors of a shape."""
    from stattn.kernels import gate, gate_modulate
    from stattn.kernels import modulate as kernels

    x, y, dx, dy = (
        [torch.randn(1, *shape, device="cuda", dtype=torch.bfloat16) for _ in range(copies)] for _ in range(4)
    )
    vectors = [torch.randn(1, shape.channels, device="cuda") / 3 for _ in range(3)]
    scale, shift, vector = vectors
    norm = ("layer", None, None)
    moments = [kernels.forward(True, each, scale, shift, *norm, 1e-6)[1:] for each in x]
    every = (True,) * 5
    yield Tuned(
        "modulate/fwd", 2, kernels.CONFIGS,
        lambda config, i: kernels.forward(False, x[i], scale, shift, *norm, 1e-6, config),
    )  # fmt: skip
    yield Tuned(
        "modulate/bwd", 3, kernels.BACKWARD_CONFIGS,
        lambda config, i: kernels.backward(dx[i], x[i], scale, shift, *norm, *moments[i], every[1:], config),
    )  # fmt: skip
    yield Tuned("gate_residual/fwd", 3, gate.CONFIGS, lambda config, i: gate.forward(x[i], y[i], vector, config))
    yield Tuned(
        "gate_residual/bwd", 3, gate.BACKWARD_CONFIGS,
        lambda config, i: gate.backward(dx[i], y[i], vector, True, config),
    )  # fmt: skip
    yield Tuned(
        "gate_residual_modulate/fwd", 4, gate_modulate.CONFIGS,
        lambda config, i: gate_modulate.forward(False, x[i], y[i], *vectors, *norm, 1e-6, config),
    )  # fmt: skip
    yield Tuned(
        "gate_residual_modulate/bwd", 6, gate_modulate.BACKWARD_CONFIGS,
        lambda config, i: gate_modulate.backward(
            dx[i], dy[i], x[i], y[i], *vectors, *norm, *moments[i], every, config
        ),
    )  # fmt: skip


def tune(only: str) -> None:
    """Time every CONFIG of the kernels whose name holds ``only``, and print its share of the copy rate."""
    print("| kernel | shape | config | us | of copy |\n|---|---|---|---:|---:|")
    for name, shape in GPU_SHAPES.items():
        copies = results.copies_for(2 * 2 * shape.tokens * shape.channels)
        for kernel in tuned(shape, copies):
            if only not in kernel.name:
                continue
            size = kernel.passes * shape.tokens * shape.channels * 2
            contenders: dict[str, Callable[[int], Any]] = {
                str(config): partial(kernel.call, config) for config in kernel.configs
            }
            timings = results.time_in_graph({**contenders, "copy": copier(size, copies, "cuda")}, copies=copies)
            for config, timing in timings.items():
                share = timings["copy"].median / timing.median
                print(f"| {kernel.name} | {name} | {config} | {timing.median * 1e3:.1f} | {share:.1%} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=tune.__doc__)
    parser.add_argument("--tune", action="store_true", required=True)
    parser.add_argument("--only", default="", help="part of a kernel's name, as modulate/bwd")
    tune(parser.parse_args().only)
