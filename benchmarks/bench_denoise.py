"""denoise_step at the latents of Wan at 720p, beside the eager and the compiled expression and a copy of as many bytes.

    python -m pytest benchmarks/bench_denoise.py --results benchmarks/results/h200
    python -m benchmarks.bench_denoise --tune          # on a GPU: every CONFIG, as a table

Names are ops/<operation>/fwd/<step> as in ``bench_ops``: denoise_step, denoise_step-eager, -compiled and -copy. The
state is fp32; model outputs are bf16 tokens of patches (1, 2, 2), with "-latents" fp32 latents. All is timed by graph
replay. The bytes of the copy count every tensor once, whether or not a step must read it twice. Where a step draws
numbers, the expressions draw theirs by ``torch.randn_like``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks.bench_ops import copier, skip_unless_measured, time_and_record, touch
from stattn import results
from stattn.ops.denoise import denoise_step

WAN_720P = (1, 16, 21, 90, 160)
TINY = (1, 3, 8, 16, 16)
PATCH = (1, 2, 2)

EULER: dict[str, Any] = {"target": "velocity", "weights": (1.0, -0.05)}
UNIPC: dict[str, Any] = {"weights": (0.9, 0.3, -0.15, 0.05), "past": 2}
# guidance of 5 throughout; past, known, noise: so many tensors more.
STEPS: dict[str, dict[str, Any]] = {
    "euler-cfg": EULER,
    "unipc-cfg": UNIPC,
    "unipc-cfg-blend": UNIPC | {"known": True, "noise": True, "known_sigma": 0.4},
    "unipc-cfg-blend-seed": UNIPC | {"known": True, "seed": 7, "known_sigma": 0.4},
    "euler-cfg-rescale": EULER | {"rescale": 0.7},
    "euler-cfg-zero_star": EULER | {"zero_star": True},
}
FROM_LATENTS = ("euler-cfg", "unipc-cfg")
LABELS = [(step, latents) for step in STEPS for latents in (False, True) if not latents or step in FROM_LATENTS]
CASES = [
    pytest.param(step, latents, device, id=f"{step}{'-latents' * latents}-{device}", marks=marks)
    for device, marks in (("cpu", ()), ("cuda", (pytest.mark.gpu,)))
    for step, latents in LABELS
]


def draw(step: str, latents: bool, device: str) -> dict[str, Any]:
    """The arguments of a step, by keyword."""
    size = WAN_720P if device == "cuda" else TINY
    options = dict(STEPS[step]) | {"sigma": 0.6, "guidance": 5.0}
    tokens = size[2] * (size[3] // 2) * (size[4] // 2)
    shape, dtype = (size, torch.float32) if latents else ((1, tokens, 4 * size[1]), torch.bfloat16)
    output = torch.randn(shape, device=device)
    # Close to the conditional output, as models' are.
    options["uncond"] = (output + 0.3 * torch.randn_like(output)).to(dtype)
    options |= {"sample": torch.randn(size, device=device), "output": output.to(dtype)}
    options |= {} if latents else {"patch": PATCH}
    options["history"] = tuple(torch.randn(size, device=device) for _ in range(options.pop("past", 0)))
    if options.pop("known", False):
        mask = torch.rand((1, 1, *size[2:]), device=device) > 0.5
        options |= {"known": torch.randn(size, device=device), "generated": mask}
    if options.pop("noise", False):
        options["noise"] = torch.randn(size, device=device)
    return options


def call(options: dict[str, Any], impl: str = "auto") -> tuple[Tensor, Tensor]:
    rest = {name: value for name, value in options.items() if name not in ("sample", "output")}
    return denoise_step(options["sample"], options["output"], impl=impl, **rest)


def drawn(options: dict[str, Any]) -> dict[str, Any]:
    """Put numbers of PyTorch's in the place of a seed: compiling the counters of ours takes many minutes."""
    if "seed" not in options:
        return options
    return {key: x for key, x in options.items() if key != "seed"} | {"noise": torch.randn_like(options["sample"])}


def bytes_moved(options: dict[str, Any]) -> int:
    """Return the bytes of all tensors of a step, its two results included."""
    tensors = [x for x in options.values() if isinstance(x, Tensor)] + [*options["history"], *[options["sample"]] * 2]
    return sum(x.numel() * x.element_size() for x in tensors)


def assert_close(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """Compare with the reference, both in fp32: a dozen roundings of terms as large as the largest."""
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


@pytest.mark.parametrize(("step", "latents", "kind"), CASES)
def test_a_step(benchmark: Any, report: results.Report, device: str, step: str, latents: bool, kind: str) -> None:
    skip_unless_measured(device, kind)
    torch.manual_seed(0)
    size = bytes_moved(draw(step, latents, device))
    copies = results.copies_for(size) if device == "cuda" else 2
    given = [draw(step, latents, device) for _ in range(copies)]
    expressions: dict[str, Callable[[dict[str, Any]], Any]] = {}
    if device == "cuda":
        torch.compiler.reset()
        eager = partial(call, impl="reference")
        expressions = {"eager": eager, "compiled": torch.compile(eager, fullgraph=True, dynamic=False)}
    name = f"{step}{'-latents' * latents}"
    with torch.no_grad():
        assert_close(call(given[0]), call(given[0], "reference"))
        numbers = drawn(given[0])
        for each in expressions.values():
            assert_close(each(numbers), call(numbers, "reference"))
        del numbers
        timed: dict[str, Callable[[int], Any]] = {f"ops/denoise_step/fwd/{name}": lambda copy: call(given[copy])}
        timed |= {
            f"ops/denoise_step-{each}/fwd/{name}": (lambda copy, run=run: run(drawn(given[copy])))
            for each, run in expressions.items()
        }
        time_and_record(report, timed, f"denoise_step/fwd/{name}", size, copies, device)
        touch(benchmark, lambda: call(given[0]), device)


def tune() -> None:
    """Time every CONFIG for every step, and print its share of the copy rate."""
    from stattn.kernels import denoise as kernels

    print("| step | config | us | of copy |\n|---|---|---:|---:|")
    for step, latents in LABELS:
        torch.manual_seed(0)
        size = bytes_moved(draw(step, latents, "cuda"))
        copies = results.copies_for(size)
        given = [draw(step, latents, "cuda") for _ in range(copies)]

        def run(config: Any, copy: int, given: Any = given) -> Any:
            with mock.patch.object(kernels.advance, "__defaults__", (config,)):
                return call(given[copy], "triton")

        timed: dict[str, Callable[[int], Any]] = {str(config): partial(run, config) for config in kernels.CONFIGS}
        timings = results.time_in_graph({**timed, "copy": copier(size, copies, "cuda")}, copies=copies)
        for config, timing in timings.items():
            share = timings["copy"].median / timing.median
            label = f"{step}{'-latents' * latents}"
            print(f"| {label} | {config} | {timing.median * 1e3:.1f} | {share:.1%} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=tune.__doc__)
    parser.add_argument("--tune", action="store_true", required=True, help="what to do")
    parser.parse_args()
    tune()
