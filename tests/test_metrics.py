"""Metrics: formulas against scipy and against the definition, written out; motion against the world's truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from stattn import metrics, world
from stattn.metrics import motion


def _features(rows: int, columns: int, seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.normal(size=(rows, columns)) @ draw.normal(size=(columns, columns)) / columns**0.5 + draw.normal()


@pytest.mark.smoke
@pytest.mark.parametrize("rows, columns", [(200, 16), (40, 64), (64, 64), (300, 40)])
def test_the_frechet_distance_is_that_of_the_matrix_square_root(rows: int, columns: int) -> None:
    a, b = _features(rows, columns, 1), 1.3 * _features(rows + 7, columns, 2)
    cov1, cov2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov1 @ cov2).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)
    assert metrics.frechet_from_moments(a.mean(0), cov1, b.mean(0), cov2) == pytest.approx(expected, rel=1e-5)
    assert metrics.frechet_distance(a, a[::-1].copy()) == pytest.approx(0, abs=1e-6)


@pytest.mark.smoke
def test_the_mmd_is_its_definition_and_without_bias() -> None:
    a, b = _features(9, 5, 1), _features(7, 5, 2)

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 5 + 1) ** 3)

    within = [np.mean([kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j]) for x in (a, b)]
    expected = sum(within) - 2 * np.mean([[kernel(x, y) for y in b] for x in a])
    assert metrics.mmd_poly(a, b) == pytest.approx(expected, rel=1e-9)
    draw = np.random.default_rng(3)
    same = [metrics.mmd_poly(draw.normal(size=(20, 8)), draw.normal(size=(20, 8))) for _ in range(300)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 300**0.5
    assert min(same) < 0 < max(same)


def test_the_frechet_distance_is_biased_by_few_clips_and_the_mmd_is_not() -> None:
    draw = np.random.default_rng(0)

    def mean(metric: object, rows: int) -> float:
        return float(np.mean([metric(draw.normal(size=(rows, 32)), draw.normal(size=(rows, 32))) for _ in range(6)]))  # type: ignore[operator]

    curve = [mean(metrics.frechet_distance, rows) for rows in (64, 256, 1024)]
    assert curve[0] > 3 * curve[1] > 9 * curve[2] > 0
    assert abs(mean(metrics.mmd_poly, 64)) < 0.1 * curve[0] / 32


@pytest.mark.smoke
def test_consistency_and_clipsim_follow_their_formulas() -> None:
    rows = torch.randn(5, 7)
    cos = torch.nn.functional.cosine_similarity
    pairs = [
        (max(0.0, cos(rows[t], rows[t - 1], dim=0).item()) + max(0.0, cos(rows[t], rows[0], dim=0).item())) / 2
        for t in range(1, 5)
    ]
    assert metrics.cos_consistency(rows) == pytest.approx(sum(pairs) / 4, rel=1e-5)
    assert metrics.cos_consistency(rows[:1].repeat(3, 1) * torch.tensor([[1.0], [2.0], [5.0]])) == pytest.approx(1)
    assert metrics.cos_consistency(torch.stack((rows[0], -rows[0]))) == 0
    text = torch.randn(7)
    expected = sum(cos(row, text, dim=0).item() for row in rows) / 5
    assert metrics.clipsim(rows, text) == pytest.approx(expected, rel=1e-5)
    assert metrics.clipsim(rows[:1, :1], text[:1]) == pytest.approx((rows[0, 0] * text[0]).sign().item())


def test_features_that_do_not_fit_are_refused() -> None:
    good = torch.randn(4, 3)
    bad = good.clone()
    bad[0, 0] = math.nan
    for call, name in (
        (lambda: metrics.frechet_distance(good[:1], good), "a of shape"),
        (lambda: metrics.frechet_distance(good, bad), "not finite"),
        (lambda: metrics.mmd_poly(good, good[:, :2]), "3 and 2 features"),
        (lambda: metrics.mmd_poly(good, good, degree=0), "degree=0"),
        (lambda: metrics.cos_consistency(good[0]), "features of shape"),
        (lambda: metrics.clipsim(good, good[0, :2]), "text of shape"),
    ):
        with pytest.raises(ValueError, match=name):
            call()


@pytest.mark.smoke
def test_flicker_smoothness_and_warp_error_on_clips_whose_values_are_known() -> None:
    still = torch.rand(3, 1, 16, 16).expand(3, 5, 16, 16) * 2 - 1
    assert metrics.flicker(still) == 1
    assert metrics.motion_smoothness(still) == pytest.approx(1, abs=1e-6)
    assert metrics.warp_error(still) == 0
    blink = torch.zeros(3, 4, 16, 16, dtype=torch.uint8)
    blink[:, 1::2] = 51
    assert metrics.flicker(blink) == pytest.approx(0.8)
    moved = torch.rand(3, 1, 16, 24)
    video = torch.cat([moved[..., 4 - t : 20 - t] for t in range(3)], 1) * 2 - 1  # moves one pixel right a frame
    flow = torch.zeros(2, 2, 16, 16)
    flow[:, 0] = 1
    hidden = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
    hidden[..., -1:] = True  # leaves the picture
    assert metrics.warp_error(video, flow, hidden) == pytest.approx(0, abs=1e-10)
    assert metrics.warp_error(video, -flow, hidden) > 0.05
    assert metrics.warp_error(video, flow, ~hidden) > 0.01
    assert math.isnan(metrics.warp_error(video, flow, torch.ones_like(hidden)))
    a, b = torch.zeros(3, 1, 2, 2), torch.full((3, 1, 2, 2), 0.2)
    assert metrics.psnr(a, b) == pytest.approx(20, abs=1e-4)
    assert metrics.psnr(a, a) == math.inf


def _truth(scene: world.Scene, layer: int) -> Tensor:
    """Give where frame 0's scenery goes: p' = A_t^-1 (A_0 p + b_0 - b_t)."""
    matrix, shift = scene.layer(layer)
    back = torch.linalg.inv(matrix)
    return torch.cat((back @ matrix[:, :1], back @ (shift[:, :1] - shift)[..., None]), -1)


@pytest.mark.smoke
@pytest.mark.parametrize(
    "cameras",
    [("pans left", "pans right", "tilts up", "tilts down"), ("zooms in", "zooms out"), ("rolls left", "rolls right")],
)
def test_the_camera_track_recovers_the_camera(cameras: tuple[str, ...]) -> None:
    clips = world.render(6, 6, seed=4, cameras=cameras)
    track, truth = motion.camera_track(clips.video), _truth(clips.scene, 0).double()
    corner = torch.tensor([[32.0, -32, 0], [32, 32, 0], [1, 1, 1]], dtype=torch.float64)
    error = ((track - truth) @ corner)[:, -1].norm(dim=1).amax(1)
    moved = ((truth - truth[:, :1]) @ corner)[:, -1].norm(dim=1).amax(1)
    assert error.median() < 0.25
    assert error.max() < 1
    assert moved.min() > 3


@pytest.mark.smoke
def test_phase_correlation_finds_whole_and_broken_shifts() -> None:
    picture = world.render(1, 1, 96, 96, seed=2).video[:, :, 0]
    crop = picture[..., 16:80, 16:80]
    for x, y in ((0, 0), (5, -3), (-9, 12)):
        shifted = picture[..., 16 - y : 80 - y, 16 - x : 80 - x]
        found = metrics.phase_correlation(crop, shifted)[0]
        torch.testing.assert_close(found, torch.tensor([x, y], dtype=torch.float64), atol=0.3, rtol=0)


def test_flow_is_near_the_truth_where_there_is_something_to_see() -> None:
    clips = world.render(6, 5, seed=9)
    frames, truth = clips.video.transpose(1, 2), clips.scene.flow()
    flow = metrics.optical_flow(frames[:, :-1].flatten(0, 1), frames[:, 1:].flatten(0, 1)).unflatten(0, (6, 4))
    error = (flow - truth).norm(dim=2)
    # Inside a disc of one colour nothing says how it moves: there classical flow fails, and the mean with it.
    moving = truth.norm(dim=2) > 0.5
    assert error[moving].median() < 0.3
    assert (error[moving] < 0.5 * truth.norm(dim=2)[moving]).float().mean() > 0.6
    for clip, known in zip(clips.video, truth, strict=True):
        none = metrics.warp_error(clip, torch.zeros_like(known), torch.zeros_like(known[:, :1], dtype=torch.bool))
        assert metrics.warp_error(clip) < 0.2 * none
        assert metrics.warp_error(clip, known) < 0.2 * none


def test_metrics_of_a_clip_fall_with_graded_corruption() -> None:
    clip = world.render(1, 9, seed=11).video[0]
    noise = torch.randn_like(clip)
    noisy = [(clip + level * noise).clamp(-1, 1) for level in (0, 0.05, 0.15, 0.4)]
    drift = [clip * (1 - level * torch.linspace(0, 1, 9)[:, None, None]) for level in (0, 0.3, 0.8)]
    flashes = [clip + level * (torch.arange(9) % 2)[:, None, None] for level in (0, 0.1, 0.3)]
    order = torch.tensor([0, 5, 2, 7, 4, 1, 6, 3, 8])
    for grades in (noisy, flashes, drift, [clip, clip[:, order]]):
        errors = [metrics.warp_error(each) for each in grades]
        assert errors == sorted(errors)
        assert errors[-1] > 1.2 * errors[0]
    for metric in (metrics.flicker, metrics.motion_smoothness):
        for grades in (noisy, flashes, [clip, clip[:, order]]):
            values = [metric(each) for each in grades]
            assert values == sorted(values, reverse=True)
            assert values[0] - values[-1] > 1e-3


def test_clips_that_do_not_fit_are_refused() -> None:
    clip = torch.zeros(3, 4, 8, 8)
    for call, kind, name in (
        (lambda: metrics.flicker(clip[0]), ValueError, "video of shape"),
        (lambda: metrics.flicker(clip[:, :1]), ValueError, "1 frames"),
        (lambda: metrics.flicker(clip.int()), TypeError, "int32"),
        (lambda: metrics.flicker(clip.numpy()), TypeError, "video of type ndarray must be a tensor"),
        (lambda: metrics.frechet_distance(None, clip[0, 0]), TypeError, "a=None must be an array"),
        (lambda: metrics.psnr(clip, clip, clip[0] > 0), ValueError, r"where must be booleans of shape \(1, 4, 8, 8\)"),
        (lambda: metrics.warp_error(clip, torch.zeros(3, 2, 8, 7)), ValueError, "flow of shape"),
        (lambda: metrics.warp_error(clip, torch.zeros(3, 2, 8, 8), torch.zeros(3, 1, 8, 8)), ValueError, "hidden of"),
        (lambda: metrics.psnr(clip, clip[:, :2]), ValueError, "must be equal"),
        (lambda: metrics.psnr(clip, clip, torch.zeros(1, 4, 8, 8, dtype=torch.bool)), ValueError, "where leaves"),
        (lambda: metrics.phase_correlation(clip[0], clip[0]), ValueError, "a of shape"),
        (lambda: metrics.optical_flow(clip, clip[:, :2]), ValueError, r"b of shape \(3, 2, 8, 8\) must"),
        (lambda: metrics.affine_motion("a", clip), TypeError, "a of type str must be a tensor"),
        (lambda: metrics.camera_track(clip), ValueError, r"video of shape \(3, 4, 8, 8\) must be \[B, 3, T, H, W\]"),
        (lambda: metrics.camera_track(clip[None, :, :1]), ValueError, "T >= 2"),
    ):
        with pytest.raises(kind, match=name):
            call()
