"""Diffusers' video transformers under stattn on a Hopper GPU: the CUDA kernels within models, in bf16.

Heads are of 64 features here, which those kernels serve. What is right is the original in fp32 on a CPU, with the same
weights, under a dense mask of PyTorch's attention; how near to it one must be, the original in bf16 on the GPU says.
"""

import copy

import pytest
import torch
from hosts import FAMILIES, Masked, cogvideox, first, run, run_masked
from rules import check_rule_1

import stattn
from stattn import extension, masks
from stattn.integrations import diffusers_backend

pytest.importorskip("diffusers")

DEVICE, DTYPE = "cuda", torch.bfloat16
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == extension.CAPABILITY
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER or not extension.LIBRARY.exists(), reason="no Hopper GPU, or no CUDA library"),
]
MASK = masks.window(3, 3, 5)
GRID = (4, 6, 8)
WIDE = {"attention_head_dim": 64}
CHANGES = {
    "HunyuanVideoTransformer3DModel": {**WIDE, "rope_axes_dim": (16, 24, 24)},
    "HunyuanVideo15Transformer3DModel": {**WIDE, "rope_axes_dim": (16, 24, 24)},
    "LTXVideoTransformer3DModel": {**WIDE, "cross_attention_dim": 128},
    "LTX2VideoTransformer3DModel": {**WIDE, "cross_attention_dim": 128},
    "Kandinsky5Transformer3DModel": {"model_dim": 128, "axes_dims": (16, 24, 24)},
}
NORM_ROPE = {
    "cogvideox-2b": "norm by the model (LayerNorm), no RoPE",
    "consisid": "norm by the model (LayerNorm), RoPE fused",
    "cogvideox": "norm by the model (LayerNorm), RoPE fused",
    "mochi": "norm by the model (MochiRMSNorm), RoPE by itself",
    "ltx": "by the model",
    "kandinsky": "by the model",
    "cosmos": "-",
}


def build(name):
    """Make a model in bf16 on the GPU, and the same in fp32 on the CPU."""
    family = FAMILIES[name]
    changes = CHANGES.get(family.kind, WIDE)
    changes = changes | {name: 128 for name in ("added_kv_proj_dim", "img_context_dim_out") if name in family.config}
    made = family.build(**changes)
    wide = made._keep_in_fp32_modules or []  # as from_pretrained would load it
    for path, tensor in (*made.named_parameters(), *made.named_buffers()):
        if not any(each in path.split(".") for each in wide) and tensor.is_floating_point():
            tensor.data = tensor.data.to(DTYPE)
    return copy.deepcopy(made).to(DEVICE), made.float()


def inputs(name, grid=GRID, batch=2):
    """Draw inputs that bf16 holds, in both forms."""
    call = FAMILIES[name].inputs(grid, batch)
    if call.get("image_rotary_emb") is not None:
        call["image_rotary_emb"] = cogvideox(grid, batch, head_dim=64)["image_rotary_emb"]
    angles = "image_rotary_emb"
    wide = {key: value if key == angles else rounded(value) for key, value in call.items()}
    return {key: placed(value, narrow=key != angles) for key, value in wide.items()}, wide


def rounded(value):
    if isinstance(value, tuple):
        return tuple(map(rounded, value))
    return value.to(DTYPE).float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def placed(value, narrow):
    if isinstance(value, list | tuple):
        return type(value)(placed(each, narrow) for each in value)
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(DEVICE, DTYPE if narrow and value.is_floating_point() else value.dtype)


def results(name, transformer, truth, mask, calls):
    """Run the accelerated model, the original, and what is right, under one mask."""
    side = FAMILIES[name].side
    with stattn.accelerate(transformer, mask) as handle:
        found = [run(transformer, call) for call, _ in calls]
        report = handle.report()
    eager = [run_masked(transformer, call, mask, GRID, side)[0] for call, _ in calls]
    return found, eager, [run_masked(truth, wide, mask, GRID, side)[0] for _, wide in calls], report


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_equals_a_dense_masked_run_by_the_cuda_kernels(name):
    transformer, truth = build(name)
    calls = [inputs(name) for _ in range(2)]
    plain = [run(transformer, call) for call, _ in calls]
    for mask in (masks.window(*GRID), MASK):
        found, eager, want, report = results(name, transformer, truth, mask, calls)
        check_rule_1(found, eager, want)
        assert {each.impl for each in report} == {"cuda"}
        assert all(each.calls >= len(calls) for each in report)
        (how,) = {each.norm_rope for each in report}
        assert how == next((text for start, text in NORM_ROPE.items() if name.startswith(start)), "fused")
    assert all(torch.equal(run(transformer, call), before) for (call, _), before in zip(calls, plain, strict=True))
    other, wide = inputs(name, (3, 5, 7), 1)
    with stattn.accelerate(transformer, MASK):
        again = [run(transformer, calls[0][0]), run(transformer, other)]
    assert torch.equal(again[0], found[0])
    shape, side = (3, 5, 7), FAMILIES[name].side
    check_rule_1(
        [again[1]], *([run_masked(m, c, MASK, shape, side)[0]] for m, c in ((transformer, other), (truth, wide)))
    )


@pytest.mark.parametrize("name", ["wan", "hunyuanvideo", "cogvideox", "ltx"])
def test_it_compiles_to_one_graph_with_the_cuda_kernels(name):
    transformer, truth = build(name)
    calls = [inputs(name) for _ in range(2)]
    found = {}
    # The compiler rounds elsewhere than eager code: what is compared are two compiled models.
    for impl in ("auto", "reference"):
        with stattn.accelerate(transformer, MASK, impl=impl) as handle:
            torch._dynamo.reset()
            compiled = torch.compile(transformer, fullgraph=True)
            with torch._dynamo.config.patch(error_on_recompile=True):
                found[impl] = [run(compiled, call) for call, _ in calls]
            taken = {each.impl for each in handle.report()}
        assert taken == {"cuda" if impl == "auto" else impl}
    want = [run_masked(truth, wide, MASK, GRID, FAMILIES[name].side)[0] for _, wide in calls]
    check_rule_1(found["auto"], found["reference"], want)


@pytest.mark.parametrize("name", ["wan", "hunyuanvideo", "cogvideox", "ltx"])
def test_a_model_in_a_cuda_graph_gives_the_same_bits(name):
    transformer, _ = build(name)
    static, calls = inputs(name)[0], [inputs(name)[0] for _ in range(3)]
    with stattn.accelerate(transformer, MASK):
        want = [run(transformer, call) for call in calls]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                run(transformer, static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(transformer, static)
        for call, expected in zip(calls, want, strict=True):
            for key, value in call.items():
                if isinstance(value, torch.Tensor):
                    static[key].copy_(value)
            graph.replay()
            assert torch.equal(out, expected)


@pytest.mark.parametrize("how", ["model", "block", "leaf"])
@pytest.mark.parametrize("name", ["wan", "hunyuanvideo-1.5"])
def test_weights_are_brought_from_the_cpu_before_they_are_used(name, how):
    accelerate = pytest.importorskip("accelerate")
    transformer, truth = build(name)
    offloaded, calls = copy.deepcopy(transformer).cpu(), [inputs(name)]
    if how == "model":
        accelerate.cpu_offload(offloaded, execution_device=torch.device(DEVICE))
    else:
        cuda, cpu = torch.device(DEVICE), torch.device("cpu")
        blocks = {"num_blocks_per_group": 1} if how == "block" else {"use_stream": True}
        offloaded.enable_group_offload(cuda, cpu, offload_type=f"{how}_level", **blocks)
    _, eager, want, _ = results(name, transformer, truth, MASK, calls)
    with stattn.accelerate(offloaded, MASK):
        found = [run(offloaded, calls[0][0]) for _ in range(2)]
    check_rule_1(found[:1], eager, want)
    assert torch.equal(*found)


@pytest.mark.parametrize("mask", [masks.window(*GRID), MASK], ids=["full", "window"])
@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_gradients_are_those_of_a_dense_masked_run(name, mask):
    transformer, truth = (each.requires_grad_(True) for each in build(name))
    call, wide = inputs(name)

    def gradients(model, given):
        first(model(**given)).square().sum().backward()
        found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        model.zero_grad()
        return found

    with stattn.accelerate(transformer, mask):
        found = gradients(transformer, call)
    with Masked(mask, GRID, FAMILIES[name].side):
        eager, want = gradients(transformer, call), gradients(truth, wide)
    assert len(found) == len(eager) == len(want)
    check_rule_1(found, eager, want)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_backend_serves_self_and_cross_attention(compiled, monkeypatch):
    name = "wan-i2v"
    transformer, truth = build(name)
    call, wide = inputs(name, batch=1)
    eager, want = run(transformer, call), run(truth, wide)
    diffusers_backend.use(transformer)
    torch._dynamo.reset()
    found = run(torch.compile(transformer, fullgraph=True) if compiled else transformer, call)
    check_rule_1([found], [eager], [want])


def share(rank, folder):
    """Run a transformer on one of two cards, in the ways of context parallelism. The first leaves the results."""
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "nccl", store=torch.distributed.FileStore(f"{folder}/store", 2), rank=rank, world_size=2
    )
    from diffusers import ContextParallelConfig

    name, shape = "wan2.2-ti2v", (3, 5, 6)
    torch.manual_seed(0)
    transformer, truth = build(name)
    call, wide = inputs(name, shape, 1)
    found = []
    for how in ("ulysses_degree", "ring_degree"):
        shared = copy.deepcopy(transformer)
        with stattn.accelerate(shared, MASK) as handle:
            shared.enable_parallelism(config=ContextParallelConfig(**{how: 2}))
            with torch.no_grad():
                found.append(first(shared(**call, return_dict=False)).cpu())
            assert {(each.impl, each.norm_rope) for each in handle.report()} == {("cuda", "fused")}
    if rank == 0:
        eager, want = (run_masked(m, c, MASK, shape, None)[0].cpu() for m, c in ((transformer, call), (truth, wide)))
        torch.save((found, eager, want), f"{folder}/results.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_two_cards_share_heads_or_tokens(tmp_path):
    torch.multiprocessing.spawn(share, (str(tmp_path),), nprocs=2)
    found, eager, want = torch.load(tmp_path / "results.pt")
    for each in found:
        check_rule_1([each], [eager], [want])
