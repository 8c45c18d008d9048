"""Public operations: each stem's file checks its arguments, chooses an implementation and registers it for autograd."""

from stattn.ops.attention import attention, explain, merge
from stattn.ops.denoise import denoise_step, philox_normal
from stattn.ops.gate import gate_residual, gate_residual_modulate
from stattn.ops.linear_gelu import linear_gelu
from stattn.ops.modulate import modulate
from stattn.ops.modulate_linear import modulate_linear
from stattn.ops.patchify import patchify3d, unpatchify3d
from stattn.ops.qk_norm_rope import qk_norm_rope, qk_norm_rope_
from stattn.ops.qk_norm_rope_means import qk_norm_rope_means
from stattn.ops.select import top_k, top_p

__all__ = [
    "attention",
    "denoise_step",
    "explain",
    "gate_residual",
    "gate_residual_modulate",
    "linear_gelu",
    "merge",
    "modulate",
    "modulate_linear",
    "patchify3d",
    "philox_normal",
    "qk_norm_rope",
    "qk_norm_rope_",
    "qk_norm_rope_means",
    "top_k",
    "top_p",
    "unpatchify3d",
]
