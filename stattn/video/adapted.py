"""A frozen DiT with adapters: camera control and memory tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stattn import dit
from stattn.dit import DiT, Embedded
from stattn.grid import Grid
from stattn.model.attention import valid_tokens
from stattn.ops._dispatch import impl_for
from stattn.ops.patchify import unpatchify3d
from stattn.rope import RopeTables
from stattn.video.camera import CameraAdapter
from stattn.video.memory import Memory

# Guidance towards the past at which objects come back: at 1 some of them stay away.
RECALL = 2.0


@dataclass(frozen=True)
class AdapterConfig:
    """The adapters of a base model.

    base: the name or path of its weights, as ``dit.load`` takes it. camera_layers: blocks copied for camera control, 0
    for none. memory_tokens, memory_layers, memory_width: of the memory, 0 tokens for none.
    """

    base: str = "tiny"
    camera_layers: int = 0
    memory_tokens: int = 0
    memory_layers: int = 2
    memory_width: int = 128


class Adapted(nn.Module):
    """A base model whose weights do not change, with adapters.

    Called like the base, with what the adapters read.
    """

    def __init__(self, base: DiT, config: AdapterConfig):
        super().__init__()
        if base.config.kind != "joint" and config.memory_tokens:
            raise ValueError(
                f"memory tokens stand beside the text: the base of kind {base.config.kind!r} has it elsewhere"
            )
        self.base = base.requires_grad_(False)
        self.config, self.adapter_config = base.config, config
        self.camera = CameraAdapter(base, config.camera_layers) if config.camera_layers else None
        self.memory = (
            Memory(base.config, config.memory_tokens, config.memory_layers, config.memory_width)
            if config.memory_tokens
            else None
        )

    def adapters(self) -> dict[str, Tensor]:
        """Give the adapters' tensors, without the base's."""
        return {name: each for name, each in self.state_dict().items() if not name.startswith("base.")}

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        text: Tensor | None = None,
        text_valid: Tensor | None = None,
        *,
        known: Tensor | None = None,
        known_mask: Tensor | None = None,
        mask: Any = None,
        ray_map: Tensor | None = None,
        past: Tensor | None = None,
        times: Tensor | None = None,
    ) -> Tensor:
        """Predict like the base, with what the adapters read.

        ray_map: [B, 4, T, H, W] of ``stattn.video.camera``, None for no camera control. past, times: [B, C, T', H, W]
        and [T'] for the memory, None for none. The other arguments are those of ``DiT.forward``.
        """
        base = self.base
        inputs = base.embed(x, timestep, text, text_valid, known=known, known_mask=known_mask, mask=mask)
        if past is not None:
            if self.memory is None or times is None:
                raise ValueError("past needs times, and a model with memory tokens")
            inputs = _remember(inputs, self.memory(past, times))
        hints = None
        if ray_map is not None:
            if self.camera is None:
                raise ValueError("ray_map is given to a model without camera control")
            _, e, e_text = base.modulations(timestep)
            hints = self.camera(inputs, e, e_text, ray_map)
        tokens = base.transform(inputs, timestep, hints=hints)
        impl = impl_for(base.patchify.impl, "patchify")
        return unpatchify3d(tokens, inputs.at.grid.shape, base.config.patch, base.config.out_channels, impl=impl)

    def steered(
        self,
        *,
        ray_map: Tensor | None = None,
        past: Tensor | None = None,
        times: Tensor | None = None,
        guidance: float = 1.0,
    ) -> Callable[..., Tensor]:
        """Give the model with its adapters' inputs filled in, to be called by a sampler.

        The sampler may call it with several copies of the batch. guidance: how far to go from the prediction without
        the past to the one with it; above 1, beyond.
        """
        return partial(self._steered, ray_map, past, times, guidance)

    def _steered(
        self,
        ray_map: Tensor | None,
        past: Tensor | None,
        times: Tensor | None,
        guidance: float,
        x: Tensor,
        *args: Any,
        **keywords: Any,
    ) -> Tensor:
        given = {
            name: each.repeat(len(x) // len(each), 1, 1, 1, 1)
            for name, each in (("ray_map", ray_map), ("past", past))
            if each is not None
        }
        out: Tensor = self(x, *args, times=times, **given, **keywords)
        if past is None or guidance == 1:
            return out
        del given["past"]
        forgetful: Tensor = self(x, *args, **given, **keywords)
        return torch.lerp(forgetful, out, guidance)


def _remember(inputs: Embedded, memory: Tensor) -> Embedded:
    """Put memory tokens behind the text."""
    tokens, text, keys, at = inputs
    batch, length = text.shape[:2]
    real = torch.ones(batch, length, dtype=torch.bool, device=text.device)
    if at.text_valid is not None:
        real = valid_tokens(at.text_valid, batch, length)
    valid = torch.cat((real, real.new_ones(batch, memory.shape[1])), 1)
    after = length + memory.shape[1]
    grid = Grid(*at.grid.shape, at.grid.before, after)
    assert at.rope is not None
    rope = RopeTables(at.rope.t, at.rope.h, at.rope.w, at.grid.before, after)
    return Embedded(
        tokens, torch.cat((text, memory.to(text.dtype)), 1), keys, at._replace(grid=grid, rope=rope, text_valid=valid)
    )


def write(tensors: dict[str, Tensor], config: AdapterConfig, path: str | Path, **notes: Any) -> None:
    """Write adapters' tensors to path (.safetensors) and their config, with notes, beside them as .json."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path={str(path)!r} must end in .safetensors")
    dit.safetensors().save_file({name: each.detach().cpu().contiguous() for name, each in tensors.items()}, path)
    record = {"adapter": vars(config), **notes}
    path.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def load(name: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Adapted:
    """Load a base model with its adapters.

    name: one that ships with the package ("camera", "memory"), or the path of a .safetensors file written by ``write``.
    Raises ValueError when there are no such weights.
    """
    path = Path(name) if str(name).endswith(".safetensors") else dit.WEIGHTS / f"{name}.safetensors"
    described = path.with_suffix(".json")
    record = json.loads(described.read_text(encoding="utf-8")) if path.is_file() and described.is_file() else {}
    if "adapter" not in record:
        raise ValueError(f"no adapter weights at {path}; train them: stattn train --preset {Path(name).stem}")
    config = AdapterConfig(**record["adapter"])
    model = Adapted(dit.load(config.base, dtype=dtype, device=device), config).to(device, dtype)
    tensors = dit.safetensors().load_file(path, device=str(device))
    missing, unknown = model.load_state_dict({key: value.to(dtype) for key, value in tensors.items()}, strict=False)
    missing = [key for key in missing if not key.startswith("base.")]
    if missing or unknown:
        raise ValueError(f"{path} does not fit its config: missing {missing}, unknown {unknown}")
    return model.eval()
