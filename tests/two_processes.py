"""What two processes compute together on a CPU, for tests that compare it with one: Ulysses, rings, DDP, FSDP2."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import stattn
from stattn import masks
from stattn.integrations import diffusers_backend

SIZE = 2
GRID, ODD = (3, 4, 6), (4, 5, 5)
PER_HEAD = [masks.window(1, 2, 3), masks.temporal()]
DIT = (3, 6, 16, 20)


def video_model() -> torch.nn.Module:
    """A DiT of stattn's own modules, with weights from the seed."""
    from tiny_models import JOINT

    from stattn.dit import DiT

    torch.manual_seed(0)
    config = replace(JOINT, masked_input=False, qk_norm="across_heads")
    model = DiT(config, mask=masks.window(1, 3, 3))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.2)
    return model


def samples(batch: int = SIZE) -> tuple[torch.Tensor, ...]:
    """A batch for the DiT: one sample a process."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *DIT, generator=generator)
    return x, torch.tensor([500.0, 300.0])[:batch], torch.tensor([[1, 2, 3], [4, 5, 6]])[:batch]


def loss(model: torch.nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return model(*batch).square().mean()


def context_parallel(name: str, how: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run a transformer of diffusers, its tokens shared by the processes. Returns its output and some gradients.

    how: "ulysses"; "ring", whose parts begin and end within frames and rows; "both", by four processes.
    """
    from diffusers import ContextParallelConfig
    from hosts import FAMILIES, first

    torch.manual_seed(0)
    family = FAMILIES[name]
    transformer, call = family.build().requires_grad_(True), family.inputs(GRID if how == "ulysses" else ODD, 1)
    degrees = {name: SIZE for name in ("ulysses_degree", "ring_degree") if how == "both" or name.startswith(how)}
    if name == "ltx":  # neither such a mask nor a gradient passes diffusers' context parallelism of cross-attention
        call["encoder_attention_mask"] = None
        if how != "ulysses":  # nor does that of PyTorch's attention on a CPU have a ring
            diffusers_backend.use(transformer)
    with stattn.accelerate(transformer, PER_HEAD, verify=how != "ulysses") as handle:
        if dist.is_initialized():
            transformer.enable_parallelism(config=ContextParallelConfig(**degrees))
        out = first(transformer(**call, return_dict=False))
        with torch.no_grad():
            again = first(transformer(**call, return_dict=False))
            if how != "both":
                transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
            compiled = first(transformer(**call, return_dict=False))
        report = handle.report()
        assert "serves it" in str(report)
        assert {each.norm_rope for each in report} == {"by the model" if name == "ltx" else "fused"}
    assert torch.equal(out, again)
    torch.testing.assert_close(compiled, out, atol=1e-5, rtol=1e-5)
    if name == "ltx":
        return out.detach().clone(), []
    out.square().sum().backward()
    grads = [
        transformer.blocks[0].attn1.to_v.weight.grad,
        transformer.blocks[0].attn1.to_k.weight.grad,
        transformer.blocks[1].attn1.norm_q.weight.grad,
    ]
    if dist.is_initialized():
        for grad in grads:
            dist.all_reduce(grad)
    return out.detach().clone(), [grad.clone() for grad in grads]


def refused() -> list[str]:
    """Say what a transformer answers that is asked for context parallelism of other kinds."""
    from diffusers import ContextParallelConfig
    from hosts import FAMILIES

    found = []
    for config in ({"ring_degree": SIZE, "ring_anything": True}, {"ulysses_degree": SIZE, "ulysses_anything": True}):
        transformer = FAMILIES["wan2.2-ti2v"].build()
        stattn.accelerate(transformer, masks.spatial())
        transformer.enable_parallelism(config=ContextParallelConfig(**config))
        try:
            transformer(**FAMILIES["wan2.2-ti2v"].inputs(GRID, 1), return_dict=False)
        except ValueError as error:
            found.append(str(error))
    return found


def data_parallel() -> list[torch.Tensor]:
    """Gradients of the DiT under DistributedDataParallel, a sample a process."""
    model = torch.nn.parallel.DistributedDataParallel(video_model())
    batch = tuple(each[dist.get_rank() :][:1] for each in samples())
    loss(model, batch).backward()
    return [parameter.grad for parameter in model.parameters()]


def sharded() -> list[torch.Tensor]:
    """Gradients of the DiT under FSDP2, block by block, with activation checkpointing."""
    from torch.distributed._composable import checkpoint
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = video_model(), init_device_mesh("cpu", (SIZE,))
    for block in model.blocks:
        checkpoint(block)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    batch = tuple(each[dist.get_rank() :][:1] for each in samples())
    loss(model, batch).backward()
    return [parameter.grad.full_tensor().clone() for parameter in model.parameters()]


def host(shard: bool = True) -> list[torch.Tensor]:
    """Gradients of an accelerated Wan under FSDP2, a sample a process; without shard, those of all samples in one."""
    from hosts import FAMILIES, first
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    family = FAMILIES["wan"]
    transformer, call = family.build().requires_grad_(True), family.inputs(GRID, SIZE)
    transformer.enable_gradient_checkpointing()
    handle = stattn.accelerate(transformer.train(), masks.window(1, 2, 3))
    if shard:
        mesh = init_device_mesh("cpu", (SIZE,))
        for block in transformer.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(transformer, mesh=mesh)
        call = {name: value[dist.get_rank() :][:1] for name, value in call.items()}
    first(transformer(**call)).square().mean().backward()
    assert handle.report()[0].norm_rope == "fused"
    grads = [parameter.grad for parameter in transformer.parameters()]
    return [grad.full_tensor().clone() if shard else grad for grad in grads]


def work(rank: int, folder: str, tasks: list[tuple[str, Any]], size: int) -> None:
    """Run tasks, a function's name and its arguments each, in one of the processes; the first leaves the results."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    torch.accelerator.device_count = lambda: 1  # diffusers divides by it
    results = {str((name, arguments)): globals()[name](*arguments) for name, arguments in tasks}
    if rank == 0:
        torch.save(results, Path(folder) / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


def together(folder: Path, tasks: list[tuple[str, Any]], size: int = SIZE) -> dict[str, Any]:
    """Run tasks in two processes, or more. Returns what the first of them computed, by task."""
    torch.multiprocessing.spawn(work, (str(folder), tasks, size), nprocs=size)
    return torch.load(folder / "results.pt", weights_only=True)
