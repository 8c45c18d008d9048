"""Tiny random transformers of diffusers, their inputs, and the same model under a dense mask of PyTorch's attention."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stattn.grid import Grid
from stattn.masks import Mask

TEXT = 8


@dataclass(frozen=True)
class Family:
    """A family: its tiny model, and what to call it with for a grid of tokens, a batch and the lengths of its texts.

    side: where the text stands among the tokens of self-attention, None for elsewhere. fullgraph: whether the original
    compiles without graph breaks.
    """

    kind: str
    config: dict[str, Any]
    inputs: Callable[[tuple[int, int, int], int], dict[str, Any]]
    side: str | None = None
    fullgraph: bool = True

    def build(self, **changes: Any) -> nn.Module:
        return model(self.kind, **{**self.config, **changes})


def randn(*shape: int) -> Tensor:
    return torch.randn(shape)


def lengths(batch: int, text: int = TEXT) -> Tensor:
    """Real text tokens of each sample: all of the first, 3 fewer of the next."""
    return (torch.arange(text) < torch.tensor([text, text - 3])[:batch, None]).long()


def model(name: str, **config: Any) -> nn.Module:
    import diffusers

    if name == "CosmosTransformer3DModel":
        stand_in_for_torchvision()
    made = getattr(diffusers, name)(**config).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, 0, 0.2) if parameter.ndim > 1 else nn.init.uniform_(parameter, 0.4, 1.2)
    return made.requires_grad_(False)


WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 10,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}


def wan(grid: tuple[int, int, int], batch: int) -> dict[str, Any]:
    t, h, w = grid
    return {
        "hidden_states": randn(batch, 4, t, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": randn(batch, TEXT, 10),
    }


def wan_image(grid: tuple[int, int, int], batch: int) -> dict[str, Any]:
    text = {"encoder_hidden_states": randn(batch, 512, 10), "encoder_hidden_states_image": randn(batch, 5, 8)}
    return wan(grid, batch) | text


def wan_tokens(grid: tuple[int, int, int], batch: int) -> dict[str, Any]:
    t, h, w = grid
    return wan(grid, batch) | {"timestep": torch.rand(batch, t * h * w) * 900}


def wan_animate(grid: tuple[int, int, int], batch: int) -> dict[str, Any]:
    t, h, w = grid
    return wan(grid, batch) | {
        "hidden_states": randn(batch, 12, t, 2 * h, 2 * w),
        "pose_hidden_states": randn(batch, 4, t - 1, 2 * h, 2 * w),
        "face_pixel_values": randn(batch, 3, 4 * t - 7, 16, 16),
    }


def vace(grid: tuple[int, int, int], batch: int) -> dict[str, Any]:
    t, h, w = grid
    return wan(grid, batch) | {"control_hidden_states": randn(batch, 6, t, 2 * h, 2 * w)}


def hunyuan(grid: tuple[int, int, int], batch: int) -> dict[str, Any]:
    t, h, w = grid
    return {
        "hidden_states": randn(batch, 4, t, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": randn(batch, TEXT, 10),
        "encoder_attention_mask": lengths(batch),
        "pooled_projections": randn(batch, 8),
        "guidance": torch.full((batch,), 6000.0),
    }


def hunyuan15(grid: tuple[int, int, int], batch: int) -> dict[str, Any]:
    t, h, w = grid
    return {
        "hidden_states": randn(batch, 4, t, h, w),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": randn(batch, TEXT, 10),
        "encoder_attention_mask": lengths(batch),
        "encoder_hidden_states_2": randn(batch, 5, 1472),
        "encoder_attention_mask_2": lengths(batch, 5),
        "image_embeds": torch.zeros(batch, 3, 8),
    }


def hunyuan15_image(grid: tuple[int, int, int], batch: int) -> dict[str, Any]:
    return hunyuan15(grid, batch) | {"image_embeds": randn(batch, 3, 8)}


def cogvideox(grid: tuple[int, int, int], batch: int, patch_t: int = 1, head_dim: int = 16) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    t, h, w = grid
    return {
        "hidden_states": randn(batch, t * patch_t, 4, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": randn(batch, TEXT, 10),
        "image_rotary_emb": get_3d_rotary_pos_embed(head_dim, ((0, 0), (h, w)), (h, w), t),
    }


def cogvideox_image(grid: tuple[int, int, int], batch: int) -> dict[str, Any]:
    t, h, w = grid
    call = cogvideox(grid, batch, patch_t=2)
    return call | {"hidden_states": randn(batch, 2 * t, 8, 2 * h, 2 * w), "ofs": torch.full((1,), 2.0)}


def ltx(grid: tuple[int, int, int], batch: int) -> dict[str, Any]:
    t, h, w = grid
    return {
        "hidden_states": randn(batch, t * h * w, 8),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": randn(batch, TEXT, 10),
        "encoder_attention_mask": lengths(batch),
        "num_frames": t,
        "height": h,
        "width": w,
    }


def ltx_image(grid: tuple[int, int, int], batch: int) -> dict[str, Any]:
    t, h, w = grid
    return ltx(grid, batch) | {"timestep": torch.full((batch, t * h * w), 500.0) * (torch.arange(t * h * w) >= h * w)}


def ltx2(grid: tuple[int, int, int], batch: int) -> dict[str, Any]:
    call = ltx(grid, batch)
    return call | {
        "audio_hidden_states": randn(batch, 9, 4),
        "audio_encoder_hidden_states": randn(batch, TEXT, 10),
        "audio_encoder_attention_mask": lengths(batch),
        "audio_num_frames": 9,
    }


def ltx2_image(grid: tuple[int, int, int], batch: int) -> dict[str, Any]:
    call = ltx_image(grid, batch)
    return ltx2(grid, batch) | {"timestep": call["timestep"], "audio_timestep": torch.full((batch,), 500.0)}


def mochi(grid: tuple[int, int, int], batch: int) -> dict[str, Any]:
    t, h, w = grid
    return {
        "hidden_states": randn(batch, 4, t, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": randn(batch, TEXT, 16),
        "encoder_attention_mask": lengths(batch).bool(),
    }


def kandinsky(grid: tuple[int, int, int], batch: int) -> dict[str, Any]:
    t, h, w = grid
    return {
        "hidden_states": randn(batch, t, 2 * h, 2 * w, 4),
        "encoder_hidden_states": randn(batch, TEXT, 10),
        "timestep": torch.full((batch,), 500.0),
        "pooled_projections": randn(batch, 8),
        "visual_rope_pos": [torch.arange(each) for each in grid],
        "text_rope_pos": torch.arange(TEXT),
    }


def kandinsky_image(grid: tuple[int, int, int], batch: int) -> dict[str, Any]:
    t, h, w = grid
    return kandinsky(grid, batch) | {"hidden_states": randn(batch, t, 2 * h, 2 * w, 9)}


def cosmos(grid: tuple[int, int, int], batch: int) -> dict[str, Any]:
    t, h, w = grid
    return {
        "hidden_states": randn(batch, 4, t, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": randn(batch, TEXT, 24),
        "padding_mask": torch.zeros(1, 1, 2 * h, 2 * w),
        "fps": 24,
    }


def stand_in_for_torchvision() -> None:
    """Give Cosmos the one function that it wants of torchvision, where that is missing."""
    from diffusers.models.transformers import transformer_cosmos

    if not hasattr(transformer_cosmos, "transforms"):
        resize = types.SimpleNamespace(resize=lambda x, size, interpolation: F.interpolate(x, size))
        nearest = types.SimpleNamespace(NEAREST="nearest")
        transformer_cosmos.transforms = types.SimpleNamespace(functional=resize, InterpolationMode=nearest)


def cosmos_image(grid: tuple[int, int, int], batch: int) -> dict[str, Any]:
    t, h, w = grid
    given = torch.zeros(batch, 1, t, 2 * h, 2 * w)
    given[:, :, 0] = 1
    return cosmos(grid, batch) | {"condition_mask": given, "timestep": torch.rand(batch, 1, t, 1, 1)}


def cosmos25(grid: tuple[int, int, int], batch: int) -> dict[str, Any]:
    return cosmos_image(grid, batch) | {"encoder_hidden_states": (randn(batch, TEXT, 10), randn(batch, 5, 8))}


def ltx2_perturbed(grid: tuple[int, int, int], batch: int) -> dict[str, Any]:
    mask = torch.ones(batch, 1, 1)
    mask[1:] = 0
    return ltx2(grid, batch) | {"spatio_temporal_guidance_blocks": [1], "perturbation_mask": mask}


WAN_ANIMATE = {
    "in_channels": 12,
    "latent_channels": 4,
    "image_dim": None,
    "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
    "motion_encoder_size": 16,
    "motion_style_dim": 8,
    "motion_dim": 4,
    "motion_encoder_dim": 16,
    "face_encoder_hidden_dim": 16,
    "face_encoder_num_heads": 2,
    "inject_face_latents_blocks": 2,
}
HUNYUAN_VIDEO = {"num_single_layers": 1, "text_embed_dim": 10, "pooled_projection_dim": 8, "guidance_embeds": True}
LTX2 = {
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 6,
    "audio_cross_attention_dim": 12,
}
HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 1,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "rope_axes_dim": (4, 4, 4),
}
COGVIDEOX = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 10,
    "num_layers": 2,
    "max_text_seq_length": TEXT,
}
LTX = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "cross_attention_dim": 24,
    "num_layers": 2,
    "caption_channels": 10,
}

MOCHI = {
    "patch_size": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "pooled_projection_dim": 16,
    "in_channels": 4,
    "text_embed_dim": 16,
    "time_embed_dim": 8,
    "max_sequence_length": TEXT,
}
KANDINSKY = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 10,
    "in_text_dim2": 8,
    "time_dim": 16,
    "model_dim": 24,
    "ff_dim": 32,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (4, 4, 4),
}
COSMOS = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "text_embed_dim": 24,
    "adaln_lora_dim": 4,
    "max_size": (4, 16, 16),
    "patch_size": (1, 2, 2),
    "extra_pos_embed_type": None,
}
COSMOS_25 = {
    "use_crossattn_projection": True,
    "crossattn_proj_in_channels": 10,
    "encoder_hidden_states_channels": 24,
    "img_context_dim_in": 8,
    "img_context_dim_out": 24,
}
ROTARY = {"use_rotary_positional_embeddings": True}
HUNYUAN_VIDEO_15 = {"text_embed_dim": 10, "text_embed_2_dim": 1472, "image_embed_dim": 8}
LTX_23 = {"perturbed_attn": True, "gated_attn": True, "rope_type": "split"}

FAMILIES: dict[str, Family] = {
    "wan": Family("WanTransformer3DModel", WAN, wan),
    "wan-i2v": Family("WanTransformer3DModel", {**WAN, "image_dim": 8, "added_kv_proj_dim": 24}, wan_image),
    "wan2.2-ti2v": Family("WanTransformer3DModel", WAN, wan_tokens),
    "wan-vace": Family("WanVACETransformer3DModel", {**WAN, "vace_layers": [0], "vace_in_channels": 6}, vace),
    "wan-animate": Family("WanAnimateTransformer3DModel", {**WAN, **WAN_ANIMATE}, wan_animate),
    "chronoedit": Family("ChronoEditTransformer3DModel", WAN, wan),
    "skyreels-v2": Family("SkyReelsV2Transformer3DModel", WAN, wan),
    "skyreels-v2-i2v": Family(
        "SkyReelsV2Transformer3DModel", {**WAN, "image_dim": 8, "added_kv_proj_dim": 24}, wan_image
    ),
    "hunyuanvideo": Family("HunyuanVideoTransformer3DModel", {**HUNYUAN, **HUNYUAN_VIDEO}, hunyuan, "after"),
    "hunyuanvideo-i2v": Family(
        "HunyuanVideoTransformer3DModel",
        {**HUNYUAN, **HUNYUAN_VIDEO, "image_condition_type": "token_replace"},
        hunyuan,
        "after",
    ),
    "hunyuanvideo-1.5": Family(
        "HunyuanVideo15Transformer3DModel", {**HUNYUAN, **HUNYUAN_VIDEO_15}, hunyuan15, "after", fullgraph=False
    ),
    "hunyuanvideo-1.5-i2v": Family(
        "HunyuanVideo15Transformer3DModel", {**HUNYUAN, **HUNYUAN_VIDEO_15}, hunyuan15_image, "after", fullgraph=False
    ),
    "cogvideox-2b": Family(
        "CogVideoXTransformer3DModel",
        COGVIDEOX,
        lambda grid, batch: cogvideox(grid, batch) | {"image_rotary_emb": None},
        "before",
    ),
    "cogvideox": Family("CogVideoXTransformer3DModel", {**COGVIDEOX, **ROTARY}, cogvideox, "before"),
    "cogvideox-1.5": Family(
        "CogVideoXTransformer3DModel",
        {**COGVIDEOX, **ROTARY, "patch_size_t": 2},
        lambda grid, batch: cogvideox(grid, batch, patch_t=2),
        "before",
    ),
    "cogvideox-1.5-i2v": Family(
        "CogVideoXTransformer3DModel",
        {**COGVIDEOX, **ROTARY, "patch_size_t": 2, "in_channels": 8, "ofs_embed_dim": 8},
        cogvideox_image,
        "before",
    ),
    "consisid": Family("ConsisIDTransformer3DModel", {**COGVIDEOX, **ROTARY}, cogvideox, "before"),
    "ltx": Family("LTXVideoTransformer3DModel", LTX, ltx),
    "ltx-i2v": Family("LTXVideoTransformer3DModel", LTX, ltx_image),
    "ltx-2": Family("LTX2VideoTransformer3DModel", {**LTX, **LTX2}, ltx2),
    "ltx-2-i2v": Family("LTX2VideoTransformer3DModel", {**LTX, **LTX2}, ltx2_image),
    "ltx-2.3": Family("LTX2VideoTransformer3DModel", {**LTX, **LTX2, **LTX_23}, ltx2_perturbed, fullgraph=False),
    "mochi": Family("MochiTransformer3DModel", MOCHI, mochi, "after", fullgraph=False),
    "kandinsky-5": Family("Kandinsky5Transformer3DModel", KANDINSKY, kandinsky),
    "kandinsky-5-i2v": Family("Kandinsky5Transformer3DModel", {**KANDINSKY, "visual_cond": True}, kandinsky_image),
    "cosmos": Family("CosmosTransformer3DModel", COSMOS, cosmos),
    "cosmos-i2v": Family(
        "CosmosTransformer3DModel", {**COSMOS, "in_channels": 5, "extra_pos_embed_type": "learnable"}, cosmos_image
    ),
    "cosmos-2.5": Family("CosmosTransformer3DModel", {**COSMOS, **COSMOS_25, "in_channels": 5}, cosmos25),
}


class Masked(torch.overrides.TorchFunctionMode):
    """Put a mask on PyTorch's attention where queries and keys are the tokens of a grid and what stands beside them."""

    def __init__(self, mask: Mask, shape: tuple[int, int, int], side: str | None):
        super().__init__()
        self.mask, self.shape, self.side, self.calls = mask, shape, side, 0

    def __torch_function__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask")
            call = dict(zip(names, args, strict=False)) | kwargs
            tokens = call["query"].shape[-2]
            t, h, w = self.shape
            if tokens == call["key"].shape[-2] and tokens >= t * h * w:
                self.calls += 1
                beside = tokens - t * h * w
                grid = Grid(t, h, w, *((beside, 0) if self.side == "before" else (0, beside)))
                allowed = self.mask.allowed(grid).to(call["query"].device)
                theirs = call.get("attn_mask")
                call["attn_mask"] = allowed if theirs is None else allowed & theirs
            return function(**call)
        return function(*args, **kwargs)


def first(output: Any) -> Tensor:
    """The video of a transformer's output."""
    return output if isinstance(output, Tensor) else output[0]


@torch.no_grad()
def run(transformer: nn.Module, call: dict[str, Any]) -> Tensor:
    return first(transformer(**call))


@torch.no_grad()
def run_masked(
    transformer: nn.Module, call: dict[str, Any], mask: Mask, shape: tuple[int, int, int], side: str | None
) -> tuple[Tensor, int]:
    """Run the original under a dense mask. Returns the output, and how many calls of attention were masked."""
    with Masked(mask, shape, side) as mode:
        return first(transformer(**call)), mode.calls
