"""Distances between sets of features, and similarities within one clip, computed in float64.

Features are arrays or tensors [N, D] with one row per clip (distances) or per frame (similarities). The caller chooses
the network that made them and names it in what is reported: "FVD(i3d)", never "FVD".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def frechet_distance(a: Any, b: Any) -> float:
    """Measure the Frechet distance between two sets of features.

    a: [N1, D], b: [N2, D]. Each set is taken as normally distributed (Heusel et al. 2017): the distance is
    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), with means m and unbiased covariances S. The estimate is biased
    upwards, more so the larger D and the smaller N: compare at equal N only, and report N. Raises ValueError for fewer
    than two rows, unequal widths, or values that are not finite.
    """
    a, b = _rows("a", a, 2), _rows("b", b, 2)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b have {a.shape[1]} and {b.shape[1]} features; they must be equal")
    left, right = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    if max(len(a), len(b)) < a.shape[1]:
        # With S = X'X, tr (S1 S2)^(1/2) is the sum of the singular values of X1 X2': small where rows are few.
        cross = torch.linalg.svdvals(left @ right.T).sum()
        trace = left.square().sum() + right.square().sum()
        return max(0.0, float((a.mean(0) - b.mean(0)).square().sum() + trace - 2 * cross))
    return frechet_from_moments(a.mean(0), left.T @ left, b.mean(0), right.T @ right)


def frechet_from_moments(mean1: Any, cov1: Any, mean2: Any, cov2: Any) -> float:
    """Measure the Frechet distance from means [D] and covariances [D, D].

    The trace of (S1 S2)^(1/2) is computed as the sum of the square roots of the eigenvalues of S1^(1/2) S2 S1^(1/2).
    That matrix is symmetric, so no complex roots arise.
    """
    mean1, cov1, mean2, cov2 = (torch.as_tensor(x, dtype=torch.float64) for x in (mean1, cov1, mean2, cov2))
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return max(0.0, float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross))


def mmd_poly(a: Any, b: Any, *, degree: int = 3, gamma: float | None = None, constant: float = 1.0) -> float:
    """Estimate the squared maximum mean discrepancy (MMD) between two sets of features, under a polynomial kernel.

    a: [N1, D], b: [N2, D]. The kernel is (gamma x.y + constant)^degree; gamma: 1/D by default. The estimate is
    unbiased, so it may be negative, and needs fewer clips than the Frechet distance. Follows Binkowski et al.,
    arXiv:1801.01401, and for video Luo et al., arXiv:2410.05203. Raises ValueError for fewer than two rows, unequal
    widths, or values that are not finite.
    """
    a, b = _rows("a", a, 2), _rows("b", b, 2)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b have {a.shape[1]} and {b.shape[1]} features; they must be equal")
    if degree < 1:
        raise ValueError(f"degree={degree} must be at least 1")
    gamma = 1 / a.shape[1] if gamma is None else gamma

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (gamma * (x @ y.T) + constant) ** degree

    def within(x: Tensor) -> Tensor:
        table = kernel(x, x)
        return (table.sum() - table.diagonal().sum()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def cos_consistency(features: Any) -> float:
    """Measure how alike the frames of one clip are, as VBench's subject and background consistency do.

    features: [T, D] of one clip. The result is the mean over frames t > 0 of (max(0, cos(f_t, f_(t-1))) + max(0,
    cos(f_t, f_0))) / 2 (arXiv:2311.17982). Raises ValueError for fewer than two frames or values that are not finite.
    """
    unit = torch.nn.functional.normalize(_rows("features", features, 2), dim=1)
    previous = (unit[1:] * unit[:-1]).sum(1).clamp(min=0)
    first = (unit[1:] @ unit[0]).clamp(min=0)
    return float(((previous + first) / 2).mean())


def clipsim(frames: Any, text: Any) -> float:
    """Measure how well one clip fits its caption: the mean over frames of cos(image feature, text feature).

    frames: [T, D]; text: [D]. Follows Wu et al., arXiv:2104.14806. Raises ValueError for unequal widths.
    """
    frames, text = _rows("frames", frames, 1), torch.as_tensor(text, dtype=torch.float64)
    if text.shape != frames.shape[1:]:
        raise ValueError(f"text of shape {tuple(text.shape)} must be {tuple(frames.shape[1:])}, as wide as frames")
    return float(torch.nn.functional.cosine_similarity(frames, text[None], dim=1).mean())


def _rows(name: str, x: Any, least: int) -> Tensor:
    if x is None or isinstance(x, str):
        raise TypeError(f"{name}={x!r} must be an array or a tensor [N, D]")
    rows = torch.as_tensor(x).detach().to("cpu", torch.float64)
    if rows.ndim != 2 or len(rows) < least or rows.shape[1] < 1:
        raise ValueError(f"{name} of shape {tuple(rows.shape)} must be [N, D] with N >= {least}")
    if not bool(torch.isfinite(rows).all()):
        raise ValueError(f"{name} holds values that are not finite")
    return rows
