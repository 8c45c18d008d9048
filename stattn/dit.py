"""The reference video diffusion transformer: the published ones in one page, to read, train and measure.

A video becomes tokens (``Patchify3D``), the noise level becomes scales, shifts and gates (adaLN), the text becomes
keys, and two kinds of block (`stattn.model.blocks`) mix them:

- ``cross``, Wan's: self-attention of the video, cross-attention to the text, feed-forward. `stattn.convert` loads Wan's
  weights.
- ``joint``: text tokens stand behind the video tokens in one attention and pass through the same projections and
  feed-forward, with a modulation of their own (CogVideoX's expert adaLN).

Around the blocks both are the same: the noise level is embedded and projected once, and each block adds its own learned
``scale_shift_table`` (adaLN-single, as in PixArt and Wan). The model says nothing about what it predicts (sample,
velocity or noise) and nothing about kernels: it runs wherever PyTorch does. `stattn.model.config` names its shapes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stattn import ranges
from stattn.blocks import BlockList
from stattn.cache import RollingKVCache, check_size
from stattn.grid import Grid, Triple, as_grid, check_positive
from stattn.masks import full
from stattn.model.blocks import CrossBlock, JointBlock, Layout, modulation
from stattn.model.config import CONFIGS, DiTConfig, resolve
from stattn.model.settings import Impl, Masks, check_mask, density
from stattn.modules import ModulatedNorm, Patchify3D, SpaceTimeAttention
from stattn.ops import _validate
from stattn.ops._dispatch import impl_for
from stattn.ops.patchify import unpatchify3d
from stattn.rope import RopeTables, rope_tables

__all__ = [
    "CONFIGS",
    "WEIGHTS",
    "CrossBlock",
    "DiT",
    "DiTConfig",
    "Embedded",
    "EncodedText",
    "JointBlock",
    "Layout",
    "load",
    "safetensors",
    "save",
    "sinusoid",
]

WEIGHTS = Path(__file__).parent / "weights"


class EncodedText(NamedTuple):
    """What a DiT makes of a text alone: the same in every step of a sampler.

    tokens: [B, L, dim]. valid: as it was given. keys: the keys and values of each CrossBlock, none of joint ones.
    """

    tokens: Tensor
    valid: Tensor | None
    keys: tuple[tuple[Tensor, Tensor], ...]


class Embedded(NamedTuple):
    """What enters the blocks: video tokens [B, N, dim], text tokens [B, L, dim] and their keys, and where all are."""

    tokens: Tensor
    text: Tensor
    keys: tuple[tuple[Tensor, Tensor], ...]
    at: Layout


class DiT(nn.Module):
    """A video diffusion transformer of a given shape.

    config: a DiTConfig, or a name in ``CONFIGS``. layers: replaces the config's. mask, impl: of every attention and
    operation; `stattn.accelerate` changes them later. Starts as the zero function: gates, shifts, scales and the last
    projection are 0 (adaLN-zero, arXiv:2212.09748). Any shape can be built without memory, under
    ``with torch.device("meta")``.
    """

    def __init__(
        self,
        config: DiTConfig | str,
        *,
        layers: int | None = None,
        mask: Masks | None = None,
        impl: Impl = "auto",
    ):
        super().__init__()
        self.config = config = resolve(config, layers)
        dim, eps = config.dim, config.eps
        block = CrossBlock if config.kind == "cross" else JointBlock
        self.patchify = Patchify3D(config.model_channels, dim, config.patch, impl=impl)
        self.time_embed = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_proj = nn.Linear(dim, 6 * dim)
        if config.kind == "joint":
            self.text_time_proj = nn.Linear(dim, 6 * dim)
        if config.vocab:
            self.words = nn.Embedding(config.vocab, config.text_dim)
            self.places = nn.Embedding(config.text_len, config.text_dim)
        if config.text_dim:
            self.text_embed = nn.Sequential(
                nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
            )
        self.blocks = nn.ModuleList(block(config, mask=mask, impl=impl) for _ in range(config.layers))
        self.norm_out = ModulatedNorm(dim, eps=eps, impl=impl)
        self.proj_out = nn.Linear(dim, config.out_channels * math.prod(config.patch))
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, dim))
        self._angles: dict[tuple[int, int, int, torch.device], tuple[Tensor, Tensor, Tensor]] = {}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the projections by Xavier's rule, with zero biases, and set what adaLN-zero wants to be 0 to 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, Patchify3D):
                module.reset_parameters()
        for name, parameter in self.named_parameters():
            if "time_proj." in name or "scale_shift_table" in name or name.startswith("proj_out."):
                nn.init.zeros_(parameter)

    @property
    def num_parameters(self) -> int:
        """The number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        text: Tensor | EncodedText | None = None,
        text_valid: Tensor | None = None,
        *,
        known: Tensor | None = None,
        known_mask: Tensor | None = None,
        mask: Masks | BlockList | None = None,
        dense_layers: int = 0,
        cache: RollingKVCache | None = None,
        tokens: bool = False,
    ) -> Tensor:
        """Predict [B, out_channels, T, H, W] from a noisy video x [B, in_channels, T, H, W], in the weights' dtype.

        timestep: the noise level in [0, 1000]: [B], per frame of tokens [B, T/pt], or per token [B, N]. text: token ids
        [B, L], or features [B, L, text_dim], or what ``encode_text`` made of them; None is no text at all, the same as
        text_valid = 0. text_valid: [B] counts, or [B, L] booleans, of real text tokens; the rest has no influence.
        known [B, in_channels, T, H, W], known_mask [B, 1, T, H, W]: the part of the video that is given (mask 1, read
        nowhere else) to a model with masked_input; None means nothing is. mask: replaces the mask of every
        SpaceTimeAttention for this call. dense_layers: the first so many attend fully. cache: x is the chunk that was
        opened last in it, and attends to the frames before it that it holds. tokens: return the patches instead,
        [B, N, pt*ph*pw*out_channels]. Raises ValueError or TypeError when an argument does not fit the config.
        """
        check_positive("dense_layers", dense_layers, least=0)
        inputs = self.embed(x, timestep, text, text_valid, known=known, known_mask=known_mask, mask=mask, cache=cache)
        predicted = self.transform(inputs, timestep, dense_layers=dense_layers, cache=cache)
        if _validate.flag("tokens", tokens):
            return predicted
        impl = impl_for(self.patchify.impl, "patchify")
        return unpatchify3d(predicted, inputs.at.grid.shape, self.config.patch, self.config.out_channels, impl=impl)

    def embed(
        self,
        x: Tensor,
        timestep: Tensor,
        text: Tensor | EncodedText | None = None,
        text_valid: Tensor | None = None,
        *,
        known: Tensor | None = None,
        known_mask: Tensor | None = None,
        mask: Masks | BlockList | None = None,
        cache: RollingKVCache | None = None,
    ) -> Embedded:
        """Embed the arguments of ``forward`` as tokens."""
        x = self.model_input(x, known, known_mask)
        tokens = self.patchify(x)
        text, text_valid, keys = self._text(text, text_valid, x.shape[0])
        grid = self.patchify.grid(x, after=text.shape[1] if self.config.kind == "joint" else 0)
        frames = self._check_timestep(timestep, x.shape[0], grid)
        if cache is not None and not isinstance(cache, RollingKVCache):
            raise TypeError(f"cache of type {type(cache).__name__} must be a RollingKVCache")
        rope = self.rope(grid, x.device) if cache is None else self._chunk_rope(cache, grid)
        at = Layout(grid, rope, frames, text_valid if text.shape[1] else None, mask)
        return Embedded(tokens, text, keys, at)

    def transform(
        self,
        inputs: Embedded,
        timestep: Tensor,
        *,
        dense_layers: int = 0,
        cache: RollingKVCache | None = None,
        hints: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Pass embedded tokens through the blocks; returns the predicted patches.

        hints: one [B, N, dim] for each of the first layers, added to the video tokens before it.
        """
        tokens, text, keys, at = inputs
        temb, e, e_text = self.modulations(timestep)
        for layer, block in enumerate(ranges.each("layer", self.blocks)):
            here = at._replace(
                mask=full() if layer < dense_layers else at.mask, cache=None if cache is None else cache.layer(layer)
            )
            if hints is not None and layer < len(hints):
                tokens = tokens + hints[layer]
            if keys:
                tokens, _ = block(tokens, keys[layer], e, e_text, here)
            else:
                tokens, text = block(tokens, text, e, e_text, here)

        shift, scale = modulation(self.scale_shift_table, temb.unsqueeze(-2))
        return self.norm_out.project(self.proj_out, tokens, scale, shift, at.frames)

    def modulations(self, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Embed noise levels [...] as [..., dim]; project them to the six of a block, and to those of its text."""
        # In the weights' precision even where autocast would round it, as Wan does.
        with torch.autocast(timestep.device.type, enabled=False):
            temb = self.embed_time(timestep)
            e, e_text = self._project_time(self.time_proj, temb), None
            if self.config.kind == "joint":
                # Frames may differ in noise; the text, which all of them read, follows the noisiest.
                temb_text = temb if timestep.ndim == 1 else self.embed_time(timestep.amax(dim=1))
                e_text = self._project_time(self.text_time_proj, temb_text)
        return temb, e, e_text

    def encode_text(self, text: Tensor, text_valid: Tensor | None = None) -> EncodedText:
        """Do once what all calls with one text share: embed it, and project it to the keys of cross-attention."""
        tokens = self.embed_text(text, text_valid, len(_is_tensor("text", text)))
        blocks = [block for block in self.blocks if isinstance(block, CrossBlock)]
        return EncodedText(tokens, text_valid, tuple(block.attn2.keys_and_values(tokens) for block in blocks))

    def kv_cache(
        self,
        batch: int,
        size: tuple[int, int],
        *,
        chunk: int,
        window: int,
        sinks: int = 0,
        text_len: int = 0,
        rebase: bool = False,
    ) -> RollingKVCache:
        """Make an empty cache for videos of (H, W); the rest as in `RollingKVCache`, frames being those of tokens.

        text_len: the text tokens of every call.
        """
        weight, config = self.proj_out.weight, self.config
        height, width = (-(-n // p) for n, p in zip(check_size(size), config.patch[1:], strict=True))
        return RollingKVCache(
            config.layers,
            batch,
            (height, width),
            config.heads,
            config.head_dim,
            chunk=chunk,
            window=window,
            sinks=sinks,
            after=check_positive("text_len", text_len, least=0) if config.kind == "joint" else 0,
            rebase=rebase,
            device=weight.device,
            dtype=weight.dtype,
        )

    def _chunk_rope(self, cache: RollingKVCache, grid: Grid) -> RopeTables:
        """Rotate the chunk by the places of its frames, and have the cache rotate what it holds by theirs."""
        cache.check(grid)

        def tables(of: Grid, positions: Tensor) -> RopeTables:
            config = self.config
            return rope_tables(
                of, config.head_dim, split=config.rope_split, theta=config.rope_theta, t_positions=positions
            )

        return cache.ropes(tables)

    def _text(
        self, text: Tensor | EncodedText | None, text_valid: Tensor | None, batch: int
    ) -> tuple[Tensor, Tensor | None, tuple[tuple[Tensor, Tensor], ...]]:
        """Return text tokens, which of them are real, and the keys and values that were made of them before."""
        if not isinstance(text, EncodedText):
            return self.embed_text(text, text_valid, batch), text_valid, ()
        if text_valid is not None:
            raise ValueError("text_valid is given beside an encoded text, which holds its own")
        if len(text.tokens) != batch:
            raise ValueError(f"text was encoded for a batch of {len(text.tokens)}, x has {batch}")
        return text

    def model_input(self, x: Tensor, known: Tensor | None, known_mask: Tensor | None) -> Tensor:
        """Check x and join it on channels with what is known: [x | known * mask | mask]."""
        config, dtype = self.config, self.proj_out.weight.dtype
        _is_tensor("x", x)
        if x.ndim != 5 or x.shape[1] != config.in_channels:
            raise ValueError(f"x of shape {tuple(x.shape)} must be [B, {config.in_channels}, T, H, W]")
        x = x.to(dtype)
        if not config.masked_input:
            if known is not None or known_mask is not None:
                raise ValueError("known and known_mask are for a model with masked_input=True; this one has False")
            return x
        if (known is None) != (known_mask is None):
            raise ValueError("known and known_mask go together: give both or neither")
        if known is None or known_mask is None:
            return torch.cat((x, torch.zeros_like(x), torch.zeros_like(x[:, :1])), dim=1)
        _is_tensor("known", known)
        _is_tensor("known_mask", known_mask)
        if known.shape != x.shape:
            raise ValueError(f"known of shape {tuple(known.shape)} must have the shape of x, {tuple(x.shape)}")
        if known_mask.shape != x[:, :1].shape:
            raise ValueError(f"known_mask of shape {tuple(known_mask.shape)} must be {tuple(x[:, :1].shape)}")
        known_mask = known_mask.to(dtype)
        # Selected, not multiplied: what is not known may hold anything, NaN included.
        known = torch.where(known_mask > 0, known.to(dtype) * known_mask, 0)
        return torch.cat((x, known, known_mask), dim=1)

    def embed_text(self, text: Tensor | None, text_valid: Tensor | None, batch: int) -> Tensor:
        """Embed text as tokens [B, L, dim]; no text gives L = 0."""
        config, weight = self.config, self.proj_out.weight
        if text is None:
            if text_valid is not None:
                raise ValueError("text_valid is given without text")
            return weight.new_zeros(batch, 0, config.dim)
        _is_tensor("text", text)
        if text_valid is not None:
            _check_valid(text_valid, batch, text)
        if not config.text_dim:
            raise ValueError(f"text of shape {tuple(text.shape)} is given to a model with text_dim=0")
        if not config.vocab:
            if text.ndim != 3 or text.shape[0] != batch or text.shape[2] != config.text_dim:
                raise ValueError(f"text of shape {tuple(text.shape)} must be [{batch}, L, {config.text_dim}]")
            return self.text_embed(text.to(weight.dtype))
        if text.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"text of dtype {text.dtype} must be token ids, int32 or int64")
        if text.ndim != 2 or text.shape[0] != batch or text.shape[1] > config.text_len:
            raise ValueError(f"text of shape {tuple(text.shape)} must be [{batch}, L], L at most {config.text_len}")
        return self.text_embed(self.words(text) + self.places.weight[: text.shape[1]])

    def embed_time(self, timestep: Tensor) -> Tensor:
        """Embed noise levels [...] as [..., dim]."""
        return self.time_embed(sinusoid(timestep, self.config.freq_dim).to(next(self.time_embed.parameters()).dtype))

    def rope(self, grid: Grid, device: torch.device) -> RopeTables:
        """Return the rotary tables of a grid; the angles are computed once per shape and device."""
        # Kept as tensors under plain keys, which torch.compile can write from a traced first call.
        key = (*grid.shape, device)
        if key not in self._angles:
            # A sampler may call first, in inference mode; training later needs tables that autograd can save.
            with torch.inference_mode(False):
                made = rope_tables(
                    grid,
                    self.config.head_dim,
                    split=self.config.rope_split,
                    theta=self.config.rope_theta,
                    device=device,
                )
            self._angles[key] = (made.t, made.h, made.w)
        return RopeTables(*self._angles[key], grid.before, grid.after)

    def flops(
        self, grid: Grid | Triple, mask: Masks | None = None, *, text_len: int | None = None, batch: int = 1
    ) -> int:
        """Count the floating point operations of one forward pass: matrix products and attention, 2 per multiply-add.

        grid: the video's tokens. mask: in place of every layer's own; attention counts the pairs that it allows.
        text_len: text tokens, the config's by default.
        """
        config, dim, batch = self.config, self.config.dim, check_positive("batch", batch)
        length = (config.text_len if text_len is None else text_len) if config.text_dim else 0
        joint = config.kind == "joint"
        video = as_grid(grid).video
        grid = Grid(*as_grid(grid).shape, after=length if joint else 0)
        ends = self.patchify.weight.numel() + self.proj_out.weight.numel()
        time = config.freq_dim * dim + dim * dim + 6 * dim * dim * (2 if joint else 1)
        text = length * (config.text_dim * dim + dim * dim) if config.text_dim else 0
        total = 2 * (video * ends + time + text)
        for layer in (each for each in self.modules() if isinstance(each, SpaceTimeAttention)):
            attended = density(check_mask(layer.mask if mask is None else mask, config.heads), grid)
            total += 2 * grid.tokens * (4 * dim * dim + 2 * dim * config.ffn_dim)
            total += round(4 * dim * attended * grid.tokens**2)
            if not joint:
                total += 2 * (2 * video + 2 * length) * dim * dim + 4 * dim * video * length
        return batch * total

    def _check_timestep(self, timestep: Tensor, batch: int, grid: Grid) -> int | None:
        _is_tensor("timestep", timestep)
        shapes = [(batch,), (batch, grid.t), (batch, grid.video)]
        if tuple(timestep.shape) not in shapes:
            raise ValueError(f"timestep of shape {tuple(timestep.shape)} must be one of {', '.join(map(str, shapes))}")
        return grid.t if timestep.shape[1:] == (grid.t,) else None

    def _project_time(self, proj: nn.Linear, temb: Tensor) -> Tensor:
        return proj(F.silu(temb).to(proj.weight.dtype)).unflatten(-1, (6, -1))


def sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """Embed numbers [...] by cosines, then sines, of dim / 2 frequencies from 1 down to 1e-4: [..., dim] in fp32."""
    frequencies = torch.exp(-math.log(1e4) / (dim // 2) * torch.arange(dim // 2, device=timestep.device))
    angles = timestep.unsqueeze(-1).float() * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def save(model: DiT, path: str | Path, **notes: Any) -> None:
    """Write a model's weights to path (.safetensors), and its config, with notes about it, beside them as .json.

    notes: anything JSON holds, e.g. the training's steps and seed.
    """
    path = _weights_path(path)
    safetensors().save_file({name: each.detach().contiguous() for name, each in model.state_dict().items()}, path)
    path.with_suffix(".json").write_text(json.dumps({"config": asdict(model.config), **notes}, indent=2) + "\n")


def load(name: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> DiT:
    """Load a model with its weights: a name that ships with the package ("tiny"), or the path of a .safetensors file.

    The config is the .json beside the weights. Returns the model in eval mode. Raises ValueError when there are no such
    weights, RuntimeError (from PyTorch) when they do not fit the config.
    """
    path = _weights_path(name) if str(name).endswith(".safetensors") else WEIGHTS / f"{name}.safetensors"
    if not path.is_file():
        shipped = ", ".join(sorted(each.stem for each in WEIGHTS.glob("*.safetensors"))) or "none"
        raise ValueError(f"name={str(name)!r}: no weights at {path}; weights that ship with stattn: {shipped}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype={dtype!r} must be a floating-point dtype")
    device = _validate.device("device", device)
    config = DiTConfig(**json.loads(path.with_suffix(".json").read_text())["config"])
    with torch.device("meta"):
        model = DiT(config)
    tensors: Mapping[str, Tensor] = safetensors().load_file(path, device=str(device))
    model.load_state_dict({name: each.to(dtype) for name, each in tensors.items()}, strict=True, assign=True)
    return model.eval()


def _is_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} of type {type(value).__name__} must be a tensor")
    return value


def _check_valid(text_valid: Tensor, batch: int, text: Tensor) -> None:
    valid = _is_tensor("text_valid", text_valid)
    booleans = valid.dtype == torch.bool and valid.shape == text.shape[:2]
    if not booleans and not (valid.dtype in (torch.int32, torch.int64) and valid.shape == (batch,)):
        raise ValueError(
            f"text_valid of shape {tuple(valid.shape)} and {valid.dtype} must be integer counts [{batch}] or booleans "
            f"{tuple(text.shape[:2])}"
        )


def _weights_path(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path={str(path)!r} must end in .safetensors")
    return path


def safetensors() -> Any:
    """Import safetensors.torch; raise ImportError naming the extra when it is missing."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("weights are safetensors files: pip install stattn[demo]") from error
    return safetensors.torch
