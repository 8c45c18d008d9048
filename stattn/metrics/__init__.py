"""Metrics of generated video: formulas on features and pixels, and the networks that make features.

``stattn evaluate A B`` applies them to folders of video files. A result that depends on a network carries its name.
"""

from stattn.metrics.distances import clipsim, cos_consistency, frechet_distance, frechet_from_moments, mmd_poly
from stattn.metrics.extractors import load, register, registered
from stattn.metrics.motion import affine_motion, camera_track, occlusion, optical_flow, phase_correlation, warp
from stattn.metrics.networks import FeatureExtractor, TextExtractor
from stattn.metrics.pixels import flicker, midway, motion_smoothness, pair_errors, psnr, warp_error

__all__ = [
    "FeatureExtractor",
    "TextExtractor",
    "affine_motion",
    "camera_track",
    "clipsim",
    "cos_consistency",
    "flicker",
    "frechet_distance",
    "frechet_from_moments",
    "load",
    "midway",
    "mmd_poly",
    "motion_smoothness",
    "occlusion",
    "optical_flow",
    "pair_errors",
    "phase_correlation",
    "psnr",
    "register",
    "registered",
    "warp",
    "warp_error",
]
