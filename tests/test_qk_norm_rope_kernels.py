"""The Triton kernels of qk_norm_rope against float64: small under the interpreter, at models' sizes on a GPU."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from stattn.grid import Grid
from stattn.kernels import qk_norm_rope as kernels
from stattn.kernels import qk_norm_rope_bwd as backward
from stattn.ops.qk_norm_rope import QK_NORM_ROPE, QKNormRopeCall, qk_norm_rope, qk_norm_rope_
from stattn.rope import RopeTables, rope_tables

CPU = pytest.param("cpu", marks=pytest.mark.interpreter)
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = (CPU, CUDA)
DTYPES = (
    *(pytest.param("cpu", dtype, marks=pytest.mark.interpreter) for dtype in (torch.float32, torch.float16)),
    *(pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
)


class Case(NamedTuple):
    """A call: k has other tokens than q when k_grid is given, as a cache of keys does."""

    grid: Grid
    heads: int
    kv_heads: int
    dim: int
    split: tuple[int, int, int] | None = None
    across: bool = False
    interleaved: bool = True
    norms: tuple[bool, bool] = (True, True)
    rotates: bool = True
    k_grid: Grid | None = None


SMALL = {
    "wan": Case(Grid(2, 1, 2), 3, 3, 16, across=True),
    "per head": Case(Grid(1, 2, 2, 1, 2), 2, 2, 16, (4, 6, 6)),
    "odd chunks": Case(Grid(1, 1, 3), 5, 5, 128, across=True),
    "half, fewer keys": Case(Grid(1, 2, 1, 2), 4, 2, 20, (0, 8, 12), interleaved=False),
    "half across heads": Case(Grid(1, 2, 2), 3, 1, 12, across=True, interleaved=False),
    "no norm": Case(Grid(1, 1, 3, 0, 1), 2, 1, 12, norms=(False, False)),
    "one norm": Case(Grid(1, 1, 2), 2, 2, 6, norms=(False, True)),
    "no rotation": Case(Grid(1, 1, 3), 2, 2, 10, across=True, rotates=False),
    "cache": Case(Grid(1, 2, 1), 2, 1, 16, k_grid=Grid(2, 2, 1)),
    "one token": Case(Grid(1, 1, 1), 1, 1, 2),
}
REAL = {
    "wan 14b": Case(Grid(3, 45, 80), 40, 40, 128, across=True),
    "wan 1.3b": Case(Grid(5, 30, 52), 12, 12, 128, across=True),
    "hunyuanvideo": Case(Grid(3, 45, 80, 0, 256), 24, 24, 128, (16, 56, 56)),
    "cogvideox": Case(Grid(5, 30, 45, 226), 48, 48, 64, (16, 24, 24)),
    "half, fewer keys": Case(Grid(5, 30, 45), 16, 4, 128, interleaved=False),
    "dim 80": Case(Grid(5, 30, 45), 30, 30, 80, across=True),
}


def cases(device: str) -> dict[str, Case]:
    return SMALL if device == "cpu" else SMALL | {f"real {name}": case for name, case in REAL.items()}


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    q_weight: Tensor | None
    k_weight: Tensor | None
    dq: Tensor
    dk: Tensor
    options: dict[str, Any]

    def run(self, impl: str, dtype: torch.dtype | None = None) -> tuple[Tensor | None, ...]:
        """q', k' and the gradients of q, k and the weights."""
        tensors = [None if x is None else x.to(dtype or x.dtype) for x in self[:6]]
        leaves = [None if x is None else x.detach().requires_grad_() for x in tensors[:4]]
        outs = qk_norm_rope(*leaves, **self.options, impl=impl)
        given = [x for x in leaves if x is not None]
        grads = iter(torch.autograd.grad(outs, given, tensors[4:]))
        return *(x.detach() for x in outs), *(None if x is None else next(grads) for x in leaves)


def problem(case: Case, dtype: torch.dtype, device: str, batch: int = 1) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    k_grid = case.k_grid or case.grid
    q, dq = draw(2, batch, case.grid.tokens, case.heads, case.dim)
    k, dk = draw(2, batch, k_grid.tokens, case.kv_heads, case.dim)
    q = q * torch.linspace(0.1, 5, case.grid.tokens, device=device, dtype=dtype)[:, None, None]
    lengths = [x.shape[2] * case.dim if case.across else case.dim for x in (q, k)]
    weights = [1 + 0.3 * draw(n) if norm else None for n, norm in zip(lengths, case.norms, strict=True)]
    rope = rope_tables(case.grid, case.dim, case.split, device=device) if case.rotates else None
    options: dict[str, Any] = {"rope": rope, "across_heads": case.across, "interleaved": case.interleaved}
    if case.k_grid is not None:
        options["k_rope"] = rope_tables(case.k_grid, case.dim, case.split, device=device)
    return Inputs(q, k, *weights, dq, dk, options)


def assert_close(got: Tensor, eager: Tensor, exact: Tensor, what: str) -> None:
    """Refuse more error than twice that of eager code, or 1.1 times its root mean square (proof.md 1)."""
    assert got.dtype == eager.dtype
    assert got.shape == eager.shape
    if exact.numel() == 0:
        return
    exact = exact.double()
    errors = (got.double() - exact).abs()
    eager_errors = (eager.double() - exact).abs()
    eps = torch.finfo(eager.dtype).eps
    worst = int(errors.argmax())
    bound = 2 * (eager_errors.max() + eps * exact.abs().max())
    at = torch.unravel_index(torch.tensor(worst), errors.shape)
    assert errors.flatten()[worst] <= bound, f"{what}{[int(i) for i in at]}: error {errors.max():.3e} above {bound:.3e}"
    rms, eager_rms, size = (each.square().mean().sqrt() for each in (errors, eager_errors, exact))
    # In float32 an error of the one factor of a row does not average out over few rows: one rounding of the result.
    # A sum of c terms one after the other is off by 0.2 sqrt(c) roundings of itself (each partial sum of i terms rounds
    # by 0.29 eps sqrt(i)): 4 for the 400 terms that a program sums at the sizes below.
    slack = (4 if "weight" in what else 1) * torch.finfo(torch.float32).eps * size
    assert rms <= 1.1 * eager_rms + slack, f"{what}: RMS error {rms:.3e}, eager {eager_rms:.3e}"


NAMES = ("q'", "k'", "dq", "dk", "dq_weight", "dk_weight")


def assert_right(inputs: Inputs, got: tuple[Tensor | None, ...] | None = None) -> None:
    got = inputs.run("triton") if got is None else got
    eager, exact = inputs.run("reference"), inputs.run("reference", torch.float64)
    for name, *each in zip(NAMES, got, eager, exact, strict=True):
        if each[2] is not None:
            assert_close(*each, name)


def assert_same(left: tuple[Any, ...], right: tuple[Any, ...]) -> None:
    for name, a, b in zip(NAMES, left, right, strict=False):
        assert (a is None and b is None) or torch.equal(a, b), name


# Right.


@pytest.mark.parametrize(("device", "dtype"), DTYPES)
def test_results_and_gradients_are_as_close_to_float64_as_eager_ones(
    device: str, dtype: torch.dtype, nan_memory: None
) -> None:
    for case in cases(device).values():
        assert_right(problem(case, dtype, device, batch=2 if device == "cuda" else 1))


@pytest.mark.parametrize("config", range(len(kernels.CONFIGS)))
@pytest.mark.parametrize("device", DEVICES)
def test_every_config_is_right(config: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.forward, "__defaults__", (kernels.CONFIGS[config],))
    monkeypatch.setattr(backward.backward, "__defaults__", (backward.CONFIGS[config],))
    names = ["wan", "half, fewer keys"] + (["real wan 14b", "real hunyuanvideo"] if device == "cuda" else [])
    for name in names:
        inputs = problem(cases(device)[name], torch.float16, device)
        got = inputs.run("triton")
        assert_right(inputs, got)
        for _ in range(50 if device == "cuda" else 1):
            assert_same(inputs.run("triton"), got)


@pytest.mark.parametrize("device", DEVICES)
def test_weights_of_another_dtype_are_read_as_they_are(device: str) -> None:
    inputs = problem(SMALL["wan"], torch.float16, device)
    wide = inputs._replace(q_weight=inputs.q_weight.float() + 1e-4, k_weight=inputs.k_weight.float() - 1e-4)
    got = wide.run("triton")
    assert [each.dtype for each in got] == [torch.float16] * 4 + [torch.float32] * 2
    assert_right(wide, got)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1e-3, 3e4])
def test_rows_of_any_size_and_a_huge_channel_are_right(device: str, scale: float) -> None:
    inputs = problem(SMALL["wan"], torch.float32, device)
    q = inputs.q * scale
    q[:, :, 1, 3] *= 1e4
    assert_right(inputs._replace(q=q))


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_of_zeros_is_zero_and_its_gradient_finite(device: str) -> None:
    inputs = problem(SMALL["wan"], torch.float32, device)
    got = inputs._replace(q=torch.zeros_like(inputs.q)).run("triton")
    assert not got[0].any()
    assert got[2].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 7])
def test_every_number_of_tokens_is_right(device: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    few = kernels.CONFIGS[0]._replace(rows=3)
    monkeypatch.setattr(backward, "_programs", lambda rows, together: min(rows, 2))
    monkeypatch.setattr(kernels.forward, "__defaults__", (few,))
    assert_right(problem(Case(Grid(1, 1, tokens), 2, 1, 8, across=True), torch.float32, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["per head", "half, fewer keys", "no norm", "cache"])
def test_a_program_that_walks_on_to_the_next_sample_keeps_its_place(
    device: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backward, "_programs", lambda rows, together: 1)
    assert_right(problem(SMALL[name], torch.float32, device, batch=3))


# Layout.


def guarded(x: Tensor, front: int = 512) -> tuple[Tensor, Tensor]:
    """Return a copy of x between NaNs, and the whole buffer."""
    buffer = torch.full((front + x.numel() + 512,), torch.nan, dtype=x.dtype, device=x.device)
    inside = buffer[front : front + x.numel()].view(x.shape)
    inside.copy_(x)
    return inside, buffer


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("front", [512, 511])  # 511: no address is a multiple of 16 bytes
def test_nothing_outside_the_tensors_is_read_or_written(device: str, front: int, nan_memory: None) -> None:
    for name in ("wan", "half, fewer keys"):
        inputs = problem(SMALL[name], torch.float16, device)
        expected = inputs.run("triton")
        pairs = [guarded(x, front) for x in inputs[:6]]
        before = [buffer.clone() for _, buffer in pairs]
        got = Inputs(*(inside for inside, _ in pairs), inputs.options).run("triton")
        if front == 512:
            assert_same(got, expected)
        assert_right(inputs, got)
        for (_, buffer), old in zip(pairs, before, strict=True):
            assert torch.equal(buffer.view(torch.int16), old.view(torch.int16))


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_of_any_strides_are_read_in_place(device: str) -> None:
    inputs = problem(SMALL["wan"], torch.float32, device)
    expected = inputs.run("triton")
    fused = torch.stack((inputs.q, inputs.k, inputs.dq, inputs.dk), dim=2)
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in fused.unbind(2)]
    spread = [torch.stack((x, torch.full_like(x, torch.nan)), dim=-1)[..., 0] for x in fused.unbind(2)]
    for q, k, dq, dk in (fused.unbind(2), swapped, spread):
        assert_same(inputs._replace(q=q, k=k, dq=dq, dk=dk).run("triton"), expected)
    one = torch.ones((), device=device).expand(inputs.q.shape)
    ones = inputs._replace(dq=one, dk=one)
    assert_same(ones.run("triton"), ones._replace(dq=one.contiguous(), dk=one.contiguous()).run("triton"))
    rope = inputs.options["rope"]
    tables = (torch.stack((x, x + 1), dim=-1)[..., 0] for x in (rope.t, rope.h, rope.w))
    views = inputs._replace(options=inputs.options | {"rope": RopeTables(*tables)})
    assert_same(views.run("triton"), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["wan", "per head"])
def test_the_update_in_place_gives_the_same_bits_and_leaves_the_values(device: str, name: str) -> None:
    case = SMALL[name]
    inputs = problem(case, torch.float16, device)
    q_out, k_out = qk_norm_rope(*inputs[:4], **inputs.options, impl="triton")
    qkv, buffer = guarded(torch.stack((inputs.q, inputs.k, inputs.dk), dim=2))
    version = qkv._version
    assert qk_norm_rope_(qkv, *inputs[2:4], **inputs.options, impl="triton") is qkv
    assert_same(qkv.unbind(2), (q_out, k_out, inputs.dk))
    assert buffer[:512].isnan().all()
    assert buffer[-512:].isnan().all()
    assert qkv._version > version
    grouped = torch.cat((inputs.q, inputs.k, inputs.dk), dim=2)
    qk_norm_rope_(grouped, *inputs[2:4], **inputs.options, kv_heads=case.heads, impl="triton")
    assert torch.equal(grouped, torch.cat((q_out, k_out, inputs.dk), dim=2))


@pytest.mark.parametrize("device", DEVICES)
def test_a_sample_does_not_depend_on_its_batch(device: str) -> None:
    inputs = problem(SMALL["wan"], torch.float16, device, batch=2)
    second = [x[1:] for x in (inputs.q, inputs.k, inputs.dq, inputs.dk)]
    alone = inputs._replace(q=second[0], k=second[1], dq=second[2], dk=second[3]).run("triton")
    assert_same(tuple(x[1:] for x in inputs.run("triton")[:4]), alone[:4])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("batch", "tokens"), [(0, 4), (2, 0)])
def test_empty_tensors_give_empty_results_and_zero_gradients(device: str, batch: int, tokens: int) -> None:
    q = torch.ones(batch, tokens, 2, 6, device=device, requires_grad=True)
    weight = torch.ones(12, device=device, requires_grad=True)
    rope = rope_tables((1, 2, 2), 6, device=device) if tokens else None
    outs = qk_norm_rope(q, q, weight, weight, rope, across_heads=True, impl="triton")
    assert [tuple(each.shape) for each in outs] == [(batch, tokens, 2, 6)] * 2
    grads = torch.autograd.grad(outs, (q, weight), (q, q))
    assert grads[0].shape == q.shape
    assert torch.equal(grads[1], torch.zeros_like(weight))


@pytest.mark.parametrize("device", DEVICES)
def test_only_the_gradients_that_are_needed_are_made(device: str) -> None:
    inputs = problem(SMALL["per head"], torch.float32, device)
    full = inputs.run("triton")
    for index in range(4):
        leaves = [x.detach().requires_grad_(i == index) for i, x in enumerate(inputs[:4])]
        outs = qk_norm_rope(*leaves, **inputs.options, impl="triton")
        (grad,) = torch.autograd.grad(outs, leaves[index : index + 1], inputs[4:6])
        assert torch.equal(grad, full[2 + index])


# Errors.


@pytest.mark.interpreter
def test_what_the_kernels_do_not_serve_is_refused_with_its_reason() -> None:
    x = torch.ones(1, 4, 2, 6)
    qk_norm_rope(x, x, None, None, None, impl="triton")
    with pytest.raises(ValueError, match="has no float64 kernel"):
        qk_norm_rope(x.double(), x.double(), None, None, None, impl="triton")
    with pytest.raises(ValueError, match="has no float64 kernel"):
        qk_norm_rope(x, x, torch.ones(6).double(), None, None, impl="triton")
    wide = torch.ones(1, 1, 300, 128)
    with pytest.raises(ValueError, match="300 heads of 128 in registers, at most 32768 features"):
        qk_norm_rope(wide, wide, None, None, None, impl="triton")


def test_auto_takes_triton_for_cuda_tensors_only() -> None:
    call = QKNormRopeCall("cuda", (9, 0), torch.bfloat16, 12, 128, True, True, (torch.bfloat16,))
    assert QK_NORM_ROPE.choose("auto", call).name == "triton"
    assert QK_NORM_ROPE.choose("auto", call._replace(device="cpu")).name == "reference"


# Determinism, graphs, compilation.


@pytest.mark.parametrize("device", DEVICES)
def test_reruns_agree_bitwise(device: str) -> None:
    inputs = problem(cases(device)["real wan 1.3b" if device == "cuda" else "wan"], torch.float16, device)
    expected = inputs.run("triton")
    side = torch.cuda.Stream() if device == "cuda" else None
    noise = torch.randn(2048, 2048, device=device)
    for _ in range(250 if device == "cuda" else 2):
        if side is not None:
            with torch.cuda.stream(side):
                noise @ noise
        assert_same(inputs.run("triton"), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_the_operations_pass_opcheck(device: str) -> None:
    inputs = problem(SMALL["cache"], torch.float32, device)
    ropes = (inputs.options["rope"], inputs.options["k_rope"])
    tables = [x for rope in ropes for x in (rope.t, rope.h, rope.w)]
    rest = (tables, [0, 0], False, 1e-6, True)
    leaves = [x.clone().requires_grad_() for x in inputs[:4]]
    ops = torch.ops.stattn
    torch.library.opcheck(ops.qk_norm_rope, (*leaves, *rest))
    torch.library.opcheck(ops.qk_norm_rope_backward, (*inputs[4:6], *inputs[:4], *rest, True, False))
    qkv = torch.randn(1, 2, 3, 2, 16, device=device)
    torch.library.opcheck(ops.qk_norm_rope_, (qkv, None, None, None, tables[:3], [0], False, 1e-6, True))


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_calls_are_one_graph_and_give_the_same_bits_at_every_size(device: str) -> None:
    torch.compiler.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"

    def both(q: Tensor, k: Tensor, weight: Tensor, rope: RopeTables, qkv: Tensor) -> tuple[Tensor, ...]:
        q, k = qk_norm_rope(q * 2, k, weight, weight, rope, impl="triton")
        return q, k, qk_norm_rope_(qkv * 2, None, None, rope, impl="triton")

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend=backend)
    for number, grid in enumerate((Grid(2, 2, 2), Grid(3, 3, 2))):
        rope = rope_tables(grid, 16, device=device)
        qkv = torch.randn(2, grid.tokens, 3, 2, 16, device=device)
        q, k = (qkv[:, :, i].clone().requires_grad_() for i in (0, 1))
        weight = torch.randn(16, device=device, requires_grad=True)
        # Without duck shapes, by which axes that happen to be as long as another are taken for the same.
        duck = torch.fx.experimental._config.patch(use_duck_shape=False)
        with torch._dynamo.config.patch(error_on_recompile=number > 0), duck:
            got = compiled(q, k, weight, rope, qkv.clone())
            got = (*got, *torch.autograd.grad(got[:2], (q, k, weight), (q.detach(), k.detach())))
        want = both(q, k, weight, rope, qkv.clone())
        want = (*want, *torch.autograd.grad(want[:2], (q, k, weight), (q.detach(), k.detach())))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
def test_a_graph_holds_four_kernels_and_replays_with_new_inputs() -> None:
    inputs = problem(SMALL["wan"], torch.bfloat16, "cuda")
    leaves = [x.clone().requires_grad_() for x in inputs[:4]]

    def step() -> tuple[Tensor, ...]:
        outs = qk_norm_rope(*leaves, **inputs.options, impl="triton")
        return (*outs, *torch.autograd.grad(outs, leaves, inputs[4:6]))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            outs = step()
    torch.cuda.synchronize()
    for _ in range(20):
        with torch.no_grad():
            for leaf in leaves:
                leaf.copy_(torch.randn_like(leaf))
        graph.replay()
        torch.cuda.synchronize()
        assert_same(outs, step())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.replay()
        torch.cuda.synchronize()
    names = [each.name for each in profile.events() if "qk_norm_rope" in each.name]
    ends = ["backward", "backward", "forward", "weight_gradient"]  # the backward once for q and once for k
    assert sorted(names) == [f"qk_norm_rope_{end}" for end in ends]


@pytest.mark.gpu
def test_other_streams_and_devices_give_the_same_bits() -> None:
    inputs = problem(SMALL["wan"], torch.bfloat16, "cuda")
    expected = inputs.run("triton")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = inputs.run("triton")
    stream.synchronize()
    assert_same(got, expected)
    if torch.cuda.device_count() > 1:
        there = [x.to("cuda:1") for x in inputs[:6]]
        options = inputs.options | {"rope": inputs.options["rope"].to("cuda:1")}
        assert_same(tuple(x.to("cuda:0") for x in Inputs(*there, options).run("triton")), expected)


# Sizes.


@pytest.mark.gpu
def test_offsets_past_two_to_the_31st_are_right() -> None:
    grid, heads, dim = Grid(21, 45, 80), 40, 128  # two samples of Wan-14B at 720p: 2.32e9 elements
    qkv = torch.randn(1, grid.tokens, 3, heads, dim, device="cuda", dtype=torch.bfloat16).repeat(2, 1, 1, 1, 1)
    weight = torch.randn(heads * dim, device="cuda", dtype=torch.bfloat16)
    rope = rope_tables(grid, dim, device="cuda")
    alone = qk_norm_rope_(qkv[:1].clone(), weight, weight, rope, across_heads=True)
    qk_norm_rope_(qkv, weight, weight, rope, across_heads=True)
    assert torch.equal(qkv[1:], alone)
    assert torch.equal(qkv[:1], alone)
    rows = torch.tensor([0, 1, 40000, grid.tokens - 1], device="cuda")
    swapped = torch.randn(1, heads, grid.tokens, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    q, _ = qk_norm_rope(swapped, swapped, weight, weight, rope, across_heads=True)
    copied, _ = qk_norm_rope(swapped.contiguous(), swapped, weight, weight, rope, across_heads=True)
    assert torch.equal(q[:, rows], copied[:, rows])


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [65536, 144000])
def test_batches_of_temporal_attention_are_right(batch: int) -> None:
    assert_right(problem(Case(Grid(1, 1, 2), 2, 2, 16), torch.bfloat16, "cuda", batch=batch))


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_refused_in_place_and_recorded_by_the_functional_operation(device: str) -> None:
    inputs = problem(SMALL["per head"], torch.float32, device)
    qkv = torch.stack((inputs.q, inputs.k, inputs.k), dim=2)
    for grad, context in ((False, torch.no_grad()), (True, nullcontext())):
        with context:
            weight = inputs.q_weight.clone().requires_grad_()
            out, _ = qk_norm_rope(inputs.q, inputs.k, weight, weight, inputs.options["rope"], impl="triton")
            assert out.requires_grad is grad
    with pytest.raises(ValueError, match="q_weight requires grad"):
        qk_norm_rope_(qkv, weight, weight, inputs.options["rope"], impl="triton")
