"""The Triton kernels of modulate and gated residuals as operations: torch.library, compile, streams, graphs, choice."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from test_modulate_kernels import DEVICES, OPERATIONS, SMALL, Case, draw, leaves, run
from torch import Tensor

from stattn.ops.gate import GATE_RESIDUAL, GateCall, gate_residual, gate_residual_modulate
from stattn.ops.modulate import MODULATE, ModulateCall, modulate

# torch.library, compile, streams, graphs.


@pytest.mark.parametrize("device", DEVICES)
def test_the_operations_pass_opcheck(device):
    ops = torch.ops.stattn
    case = SMALL["kinds differ"]
    inputs = draw(case, torch.float32, device)
    (x, y, gate, scale, shift, weight, bias), _ = leaves("gate_residual_modulate", inputs)
    norm = (case.norm, weight, bias)
    torch.library.opcheck(ops.modulate.default, (x, scale, shift, *norm, 1e-6))
    torch.library.opcheck(ops.gate_residual.default, (x, y, gate))
    torch.library.opcheck(ops.gate_residual_modulate.default, (x, y, gate, scale, shift, *norm, 1e-6))
    x, y, gate, scale, shift, weight, bias = inputs
    norm = (case.norm, weight, bias)
    torch.library.opcheck(ops.modulate_forward.default, (x, scale, shift, *norm, 1e-6))
    torch.library.opcheck(ops.gate_residual_modulate_forward.default, (x, y, gate, scale, shift, *norm, 1e-6))
    moments = ops.modulate_forward(x, scale, shift, *norm, 1e-6)[1:]
    wanted = [True] * 5
    torch.library.opcheck(ops.gate_residual_backward.default, (x, y, gate, True))
    torch.library.opcheck(ops.modulate_backward.default, (y, x, scale, shift, *norm, *moments, wanted[1:]))
    torch.library.opcheck(
        ops.gate_residual_modulate_backward.default, (None, y, x, y, gate, scale, shift, *norm, *moments, wanted)
    )


@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_block_is_one_graph_with_the_same_bits_and_serves_other_sizes(device):
    def block(x: Tensor, y: Tensor, vector: Tensor) -> Tensor:
        h = modulate(y, vector, vector, impl="triton")
        x, h = gate_residual_modulate(x, h, vector, vector, None, norm="rms", impl="triton")
        return gate_residual(x, h, vector, impl="triton")

    torch.compiler.reset()
    backend = "aot_eager" if device == "cpu" else "inductor"
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (5, 7):  # no two sizes alike: they would be taken for one
            x, y = (torch.randn(2, tokens, 24, device=device, requires_grad=True) for _ in range(2))
            vector = torch.randn(2, 24, device=device, requires_grad=True)
            results = []
            for function in (compiled, block):
                out = function(x, y, vector)
                results.append((out, *torch.autograd.grad(out, (x, y, vector), torch.ones_like(out))))
            for got, want in zip(*results, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            assert torch.equal(results[0][0], results[1][0])


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["another stream", "another device"])
def test_kernels_run_where_their_tensors_are(where):
    if where == "another device" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    device = "cuda:1" if where == "another device" else "cuda"
    case = Case(2, 900, 1536, affine=True)
    inputs = draw(case, torch.float32, device)
    douts = tuple(torch.randn(2, *inputs.x.shape, device=device))
    torch.cuda.synchronize(device)
    for operation in OPERATIONS:
        want = run(operation, case, inputs, douts, "reference")
        torch.cuda.synchronize(device)
        with torch.cuda.stream(torch.cuda.Stream()) if where == "another stream" else nullcontext():
            got = run(operation, case, inputs, douts, "triton")
            torch.cuda.current_stream(device).synchronize()
        for name, each in got.items():
            torch.testing.assert_close(each, want[name], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_graph_replays_with_new_inputs_and_holds_one_kernel_forward_and_two_backward(operation):
    case = Case(1, 900, 1536)
    inputs = draw(case, torch.bfloat16, "cuda")
    douts = tuple(torch.randn(2, *inputs.x.shape, device="cuda").bfloat16())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(operation, case, inputs, douts, "triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = run(operation, case, inputs, douts, "triton")
        graph.replay()
        stream.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            graph.replay()
            stream.synchronize()
        names = sorted(event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA)
        assert names == sorted([f"{operation}_forward", f"{operation}_backward", "finish_sums"])
        for _ in range(20):
            inputs.x.normal_()
            inputs.y.normal_()
            graph.replay()
            want = run(operation, case, inputs, douts, "triton")
            assert all(torch.equal(captured[name], each) for name, each in want.items())


# Choice and errors.


@pytest.mark.interpreter
def test_auto_takes_triton_on_cuda_only_and_says_what_it_does_not_serve():
    both = (torch.bfloat16, torch.float32)
    assert MODULATE.choose("auto", ModulateCall("cuda", (9, 0), both, 5120, "layer")).name == "triton"
    assert MODULATE.choose("auto", ModulateCall("cpu", (0, 0), both, 5120, "layer")).name == "reference"
    assert GATE_RESIDUAL.choose("auto", GateCall("cuda", (9, 0), both, 5120, None)).name == "triton"
    with pytest.raises(ValueError, match="at most 32768 channels, the call has 40000"):
        MODULATE.choose("triton", ModulateCall("cuda", (9, 0), both, 40000, "layer"))
    x, scale = torch.ones(1, 2, 8), torch.ones(1, 8)
    assert modulate(x, scale, scale, impl="triton").shape == x.shape
    with pytest.raises(ValueError, match="no float64 kernel"):
        modulate(x, scale.double(), None, impl="triton")
    with pytest.raises(ValueError, match="no float64 kernel"):
        gate_residual(x, x.double(), None, impl="triton")


@pytest.mark.interpreter
def test_a_second_derivative_is_refused():
    x = torch.randn(1, 2, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(modulate(x, None, None, impl="triton").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
