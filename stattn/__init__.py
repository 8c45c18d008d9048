"""Exact, fast 3-D attention for video diffusion transformers, and the operations around it in a denoising step."""

from stattn import masks
from stattn.accelerate import accelerate
from stattn.blocks import BlockList
from stattn.grid import Grid, Region
from stattn.ops import (
    attention,
    denoise_step,
    explain,
    gate_residual,
    gate_residual_modulate,
    linear_gelu,
    merge,
    modulate,
    modulate_linear,
    patchify3d,
    philox_normal,
    qk_norm_rope,
    qk_norm_rope_,
    qk_norm_rope_means,
    top_k,
    top_p,
    unpatchify3d,
)
from stattn.rope import RopeTables, rope_tables

__version__ = "0.1.0"

__all__ = [
    "BlockList",
    "Grid",
    "Region",
    "RopeTables",
    "accelerate",
    "attention",
    "denoise_step",
    "explain",
    "gate_residual",
    "gate_residual_modulate",
    "linear_gelu",
    "masks",
    "merge",
    "modulate",
    "modulate_linear",
    "patchify3d",
    "philox_normal",
    "qk_norm_rope",
    "qk_norm_rope_",
    "qk_norm_rope_means",
    "rope_tables",
    "top_k",
    "top_p",
    "unpatchify3d",
]
