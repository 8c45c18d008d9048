"""The sampling loop as one CUDA graph: bitwise the same, without the host, and refused where it cannot be."""

from __future__ import annotations

import pytest
import torch

from stattn import masks
from stattn.dit import DiT, DiTConfig
from stattn.graph import SampleGraph
from stattn.sampler import Diffusion, FlowMatching, sample

CONFIG = DiTConfig(
    kind="cross", layers=2, heads=2, head_dim=64, ffn_dim=256, in_channels=4, out_channels=4, patch=(1, 2, 2),
    text_dim=32, text_len=8, freq_dim=32,
)  # fmt: skip
SHAPE = (2, 4, 5, 12, 16)


def test_a_graph_needs_a_cuda_device():
    with pytest.raises(ValueError, match=r"device='cpu'.*sample\(\) runs on any"):
        SampleGraph(lambda x, t: x, SHAPE, steps=1, seed=0)


def model_on_gpu(config: DiTConfig = CONFIG) -> DiT:
    with torch.device("cuda"):
        model = DiT(config).to(torch.bfloat16).eval()
    generator = torch.Generator("cuda").manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1, generator=generator)
    return model


def texts(seed: int = 0, channels: int = 32) -> torch.Tensor:
    return torch.randn(2, 8, channels, generator=torch.Generator().manual_seed(seed)).to("cuda", torch.bfloat16)


OPTIONS = [
    {"steps": 6},
    {"steps": 20, "guidance": 3.0},
    {"steps": Diffusion(6), "guidance": 3.0, "batched": False, "rescale": 0.5, "order": 2},
    {"steps": 6, "order": 2, "corrector": True},
    {
        "steps": FlowMatching(6, 3.0), "mask": masks.window(3, 3, 3), "dense_steps": 2, "dense_layers": 1,
        "zero_star": True, "guidance": 2.0, "order": 2,
    },
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options))
def test_replays_with_new_inputs_equal_sampling_bitwise(options):
    model = model_on_gpu()
    options = {"prediction": "v", **options}
    graph = SampleGraph(model, SHAPE, text=texts(), seed=0, **options)
    for seed in range(1, 21):
        text = texts(seed)
        assert torch.equal(graph(seed=seed, text=text), sample(model, SHAPE, text=text, seed=seed, **options))
    # What is not given stays.
    assert torch.equal(graph(seed=9), sample(model, SHAPE, text=texts(20), seed=9, **options))


@pytest.mark.gpu
def test_a_graph_keeps_the_known_region_of_each_sample():
    model = model_on_gpu()
    generated = torch.zeros(1, 1, 5, 1, 1, dtype=torch.bool)
    generated[:, :, 2:] = True
    clips = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    options = {"text": texts(), "steps": 4, "prediction": "v", "generated": generated}
    graph = SampleGraph(model, SHAPE, known=clips[0], seed=0, **options)
    for seed, known in enumerate(clips):
        video = graph(seed=seed, known=known)
        assert torch.equal(video, sample(model, SHAPE, known=known, seed=seed, **options))
        assert torch.equal(video.cpu()[:, :, :2], known[:, :, :2])


@pytest.mark.gpu
def test_a_graph_reads_the_weights_where_they_are_and_refuses_what_it_fixes():
    model = model_on_gpu()
    graph = SampleGraph(model, SHAPE, text=texts(), steps=3, prediction="v")
    before = graph(seed=1)
    with torch.no_grad():
        model.proj_out.bias.add_(1)
    assert not torch.equal(graph(seed=1), before)
    assert torch.equal(graph(seed=1), sample(model, SHAPE, text=texts(), steps=3, prediction="v", seed=1))
    for change, message in (
        ({"steps": 4}, "steps: a graph takes"),
        ({"text": texts()[:, :4]}, "the graph was made for"),
        ({"text_valid": torch.tensor([1, 2])}, "text_valid is torch.int64.*made for not given"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            graph(seed=1, **change)


@pytest.mark.gpu
def test_a_model_that_waits_for_the_device_is_refused():
    def model(x, t):
        return x * x.abs().max().item()

    with pytest.raises(RuntimeError, match="cannot be captured"):
        SampleGraph(model, SHAPE, steps=2, seed=0, device="cuda")
    # Nothing of the attempt is left behind, random numbers included.
    torch.cuda.manual_seed(0)
    first = torch.rand(4, device="cuda")
    torch.cuda.manual_seed(0)
    assert torch.equal(torch.rand(4, device="cuda"), first)


@pytest.mark.gpu
def test_nothing_runs_on_the_host_between_the_steps_of_a_graph():
    model = model_on_gpu()
    kernels = {}
    for steps in (2, 4):
        graph = SampleGraph(model, SHAPE, text=texts(), steps=steps, prediction="v", seed=0)
        graph.replay()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            graph.replay()
            torch.cuda.synchronize()
        events = [each for each in profiler.events() if each.device_type == torch.autograd.DeviceType.CUDA]
        kernels[steps] = sum("memset" not in each.name.lower() for each in events)
        launches = [each for each in profiler.events() if "LaunchKernel" in each.name]
        assert not launches
    # Every step has the same kernels, and the text is encoded outside of them.
    a_step = (kernels[4] - kernels[2]) / 2
    assert a_step == int(a_step)
    assert kernels[2] > 2 * a_step
    assert a_step >= 10 * CONFIG.layers
