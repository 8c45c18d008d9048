"""Masked-region tasks: each leaves the region that its name says."""

from __future__ import annotations

import pytest
import torch

from stattn.training import tasks
from stattn.training.tasks import TASKS


def _regions(name: str, batch: int = 64, frames: int = 16, height: int = 40, width: int = 32) -> torch.Tensor:
    ids = torch.full((batch,), TASKS.index(name))
    return tasks.generated_region(ids, frames, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.smoke
def test_frame_tasks_give_whole_frames() -> None:
    assert _regions("text").all()
    for name in ("image", "interpolation", "continuation"):
        region = _regions(name)
        assert region.shape == (64, 1, 16, 40, 32)
        frames = region.flatten(3).float().mean(3)[:, 0]
        assert set(frames.unique().tolist()) == {0.0, 1.0}, name
        given = 1 - frames
        if name == "image":
            assert torch.equal(given, torch.eye(16)[:1].expand(64, -1))
        elif name == "interpolation":
            assert torch.equal(given, (torch.eye(16)[0] + torch.eye(16)[15]).expand(64, -1))
        else:
            assert given[:, 0].all()
            assert (given.diff(dim=1) <= 0).all()
            assert set(given.sum(1).tolist()) <= set(map(float, range(2, 9)))
            assert len(set(given.sum(1).tolist())) > 3


@pytest.mark.smoke
def test_inpainting_moves_a_box_and_outpainting_keeps_one_still() -> None:
    for name in ("inpaint", "outpaint"):
        region = _regions(name)
        box = region if name == "inpaint" else ~region
        rows, columns = box.any(4)[:, 0], box.any(3)[:, 0]  # [B, T, H], [B, T, W]
        assert torch.equal(box[:, 0], rows[..., None] & columns[:, :, None])  # a box, and one box
        low, high = (0.3, 0.6) if name == "inpaint" else (0.4, 0.75)
        for side in (rows, columns):
            share = side.float().mean(2)
            assert share.min() >= low - 1 / 32
            assert share.max() <= high + 1 / 32
            assert (side.int().diff(dim=2) == 1).sum(2).max() <= 1
        moved = (rows[:, 0] != rows[:, -1]).any(1) | (columns[:, 0] != columns[:, -1]).any(1)
        assert moved.all() if name == "inpaint" else not moved.any()


@pytest.mark.smoke
def test_tasks_are_drawn_in_proportion_to_their_weights() -> None:
    weights = (0.4, 0.0, 0.1, 0.2, 0.3, 0.0)
    drawn = tasks.draw_tasks(20_000, weights, generator=torch.Generator().manual_seed(2))
    shares = torch.bincount(drawn, minlength=6) / 20_000
    torch.testing.assert_close(shares, torch.tensor(weights), atol=0.015, rtol=0)
    assert shares[1] == shares[5] == 0


def test_weights_that_are_no_weights_are_refused() -> None:
    generator = torch.Generator()
    assert tasks.draw_tasks(2, (0, 0, 0, 0, 0, 1), generator=generator).tolist() == [5, 5]
    for weights in ((1, 1), (0,) * 6, (1, 1, 1, 1, 1, -1)):
        with pytest.raises(ValueError, match="weights="):
            tasks.draw_tasks(2, weights, generator=generator)
