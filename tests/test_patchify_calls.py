"""The Triton kernels of patchify and unpatchify as operations: torch.library, compile, streams, graphs, the choice."""

from __future__ import annotations

import pytest
import torch
from test_patchify_kernels import DEVICES, REAL, SMALL, problem, run
from torch import Tensor

import stattn
from stattn.kernels import patchify as kernels
from stattn.kernels import patchify_bwd
from stattn.kernels._patches import Geometry
from stattn.ops.patchify import PATCHIFY, UNPATCHIFY, PatchifyCall, patchify3d, unpatchify3d

# torch.library, compile, streams, graphs.


@pytest.mark.parametrize("device", DEVICES)
def test_the_operations_pass_opcheck(device):
    x, weight, bias, pos, dout = problem(SMALL[0], torch.float32, device, torch.randn)
    leaves = [each.clone().requires_grad_() for each in (x, weight, bias, pos)]
    ops = torch.ops.stattn
    torch.library.opcheck(ops.patchify3d.default, tuple(leaves))
    torch.library.opcheck(ops.patchify3d.default, (*leaves[:2], None, None))
    torch.library.opcheck(ops.patchify3d_dx.default, (dout, weight, [2, 4, 6]))
    torch.library.opcheck(ops.patchify3d_dweight.default, (dout, x, [1, 2, 2], torch.float32))
    torch.library.opcheck(ops.patchify3d_dweight.default, (dout, x, [1, 2, 2], None))
    torch.library.opcheck(ops.patchify3d_dpos.default, (dout, torch.float32))
    tokens = torch.randn(2, 13, 12, device=device, requires_grad=True)
    torch.library.opcheck(ops.unpatchify3d.default, (tokens, 1, [1, 2, 2], 3, [2, 4, 6]))
    torch.library.opcheck(ops.unpatchify3d_backward.default, (x, 13, 1, [1, 2, 2]))


@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_call_is_one_graph_with_the_same_bits_and_serves_other_sizes(device):
    def there_and_back(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        tokens = patchify3d(x, weight, bias, impl="triton")
        t, h, w = x.shape[2], x.shape[3] // 2, x.shape[4] // 2
        return unpatchify3d(tokens, (t, h, w), (1, 2, 2), 3, impl="triton")

    torch.compiler.reset()
    backend = "aot_eager" if device == "cpu" else "inductor"
    compiled = torch.compile(there_and_back, fullgraph=True, dynamic=True, backend=backend)
    weight = torch.randn(12, 3, 1, 2, 2, device=device, requires_grad=True)
    bias = torch.randn(12, device=device, requires_grad=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((5, 8, 14), (7, 12, 18)):  # no two sizes alike: they would be taken for one
            x = torch.randn(2, 3, *size, device=device, requires_grad=True)
            results = []
            for call in (compiled, there_and_back):
                out = call(x, weight, bias)
                results.append((out, *torch.autograd.grad(out, (x, weight, bias), torch.ones_like(out))))
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
def test_graphs_replay_new_videos_and_any_stream_will_do():
    inputs = problem(REAL[0], torch.bfloat16, "cuda", torch.randn)
    x, weight, bias, pos, dout = inputs

    def step() -> tuple[Tensor, ...]:
        return run(inputs, "triton")

    want = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert all(torch.equal(a, b) for a, b in zip(step(), want, strict=True))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
    for _ in range(20):
        for each in inputs:
            each.normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("case", REAL)
def test_250_runs_beside_another_stream_give_the_same_bits(case):
    inputs = problem(case, torch.bfloat16, "cuda", torch.randn)
    x, weight, bias, pos, dout = inputs
    geometry = Geometry.of(tuple(x.shape), x.stride(), case[3], 2)
    forward = kernels.CONFIGS[kernels.kernel_for(geometry, x.dtype)]
    kinds = (patchify_bwd.kernel_for(kind, geometry.taps, x.dtype) for kind in ("dx", "dweight"))
    dx, dweight = (patchify_bwd.CONFIGS[kind] for kind in kinds)
    calls = [
        lambda: run(inputs, "triton"),
        *(lambda each=each: (kernels.forward(x, weight, bias, pos, each),) for each in forward),
        *(lambda each=each: (patchify_bwd.dx(dout, weight, x.shape[2:], each),) for each in dx),
        *(lambda each=each: patchify_bwd.dweight(dout, x, case[3], bias.dtype, each) for each in dweight),
    ]
    noise, other = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    for number, call in enumerate(calls):
        first = call()
        for _ in range(50 if number else 250):
            with torch.cuda.stream(other):
                noise @ noise
            assert all(torch.equal(a, b) for a, b in zip(call(), first, strict=True))


@pytest.mark.gpu
def test_the_second_device_runs_while_the_first_is_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    inputs = problem(REAL[0], torch.bfloat16, "cuda:1", torch.randn)
    here = run(tuple(each.to("cuda:0") for each in inputs), "triton")
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(run(inputs, "triton"), here, strict=True))


# Choice and refusals.


def test_auto_takes_the_kernels_on_a_gpu_and_the_reference_on_a_cpu():
    for device, taken in (("cuda", "triton"), ("cpu", "reference")):
        call = PatchifyCall(device, (9, 0), torch.bfloat16, 16, (1, 2, 2), (torch.float32,))
        assert PATCHIFY.choose("auto", call).name == taken
        assert UNPATCHIFY.choose("auto", call).name == taken


@pytest.mark.interpreter
def test_what_the_kernels_do_not_serve_is_refused_with_the_reason():
    x, weight = torch.ones(1, 3, 2, 4, 4, dtype=torch.float64), torch.ones(5, 3, 1, 2, 2, dtype=torch.float64)
    with pytest.raises(
        ValueError, match="impl='triton' does not serve patchify3d for this call: has no float64 kernel"
    ):
        patchify3d(x, weight, impl="triton")
    with pytest.raises(ValueError, match="has no float64 kernel"):
        patchify3d(x.float(), weight.float(), torch.ones(5, dtype=torch.float64), impl="triton")
    tokens = torch.ones(1, 8, 12, dtype=torch.complex128)
    with pytest.raises(ValueError, match="at most 8 bytes, the tokens are torch.complex128"):
        unpatchify3d(tokens, (2, 2, 2), (1, 2, 2), 3, impl="triton")
    assert unpatchify3d(tokens, (2, 2, 2), (1, 2, 2), 3).shape == (1, 3, 2, 4, 4)
    with pytest.raises(ValueError, match="x has 2147483648 tokens in its batch"):
        kernels.forward(torch.empty(2, 1, 2**10, 2**10, 2**10, device="meta"), torch.empty(1, 1, 1, 1, 1), None, None)
    leaf = torch.ones(1, 3, 2, 4, 4, requires_grad=True)
    out = patchify3d(leaf, torch.ones(5, 3, 1, 2, 2), impl="triton")
    (gradient,) = torch.autograd.grad(out, leaf, torch.ones_like(out).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("device", DEVICES)
def test_a_module_trains_through_the_kernels(device):
    from stattn.modules import Patchify3D

    module = Patchify3D(3, 24, (1, 2, 2), impl="triton").to(device)
    x = torch.randn(2, 3, 2, 4, 4, device=device)
    before = module(x)
    loss = before.square().mean()
    loss.backward()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter -= 0.1 * parameter.grad
    assert module(x).square().mean() < loss
    assert stattn.patchify3d is patchify3d
