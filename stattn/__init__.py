"""Exact, fast 3-D attention for video diffusion transformers, and the operations around it in a denoising step."""

from stattn import masks
from stattn.blocks import BlockList
from stattn.grid import Grid, Region
from stattn.ops import attention, explain, merge, top_k, top_p

__version__ = "0.1.0"

__all__ = ["BlockList", "Grid", "Region", "attention", "explain", "masks", "merge", "top_k", "top_p"]
