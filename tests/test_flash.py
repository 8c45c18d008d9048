"""What is asked of flash-attn 2, 3 and 4, by packages that lie, name their arguments and answer as those do."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from stattn.grid import Grid, Region
from stattn.masks import full
from stattn.ops import _dense
from stattn.problem import Extras, Problem
from stattn.reference.attention import attention as reference

ATTEND = """
import torch

def attend(q, k, v, scale):
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v), scores.logsumexp(-1)
"""
# The arguments and results of each version's function.
TWO = """
def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                    alibi_slopes=None, deterministic=False, return_attn_probs=False):
    out, lse = attend(q, k, v, softmax_scale)
    return (out, lse, None) if return_attn_probs else out
"""
THREE = """
def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, window_size=(-1, -1), softcap=0.0,
                    num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False):
    out, lse = attend(q, k, v, softmax_scale)
    return (out, lse) if return_attn_probs else out
"""
FOUR = """
def flash_attn_func(q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False,
                    window_size=(None, None), num_splits=1, deterministic=False, return_lse=False):
    out, lse = attend(q, k, v, softmax_scale)
    return out, lse if return_lse else None
"""
# flash-attn 4 comes without flash_attn/__init__.py, so that it may lie beside flash-attn 2.
LAYOUTS = {
    2: {"flash_attn/__init__.py": TWO},
    3: {"flash_attn_interface.py": THREE},
    4: {"flash_attn/cute/__init__.py": "", "flash_attn/cute/interface.py": FOUR},
}


@contextmanager
def importable(files: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let flash-attn be these files."""
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(ATTEND + text)
    monkeypatch.syspath_prepend(folder)
    _forget()
    yield
    _forget()


def _forget() -> None:
    importlib.invalidate_caches()
    _dense.flash_version.cache_clear()
    _dense._flash_function.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] in ("flash_attn", "flash_attn_interface")]:
        del sys.modules[name]


@pytest.fixture(params=LAYOUTS)
def version(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Make one version importable."""
    with importable(LAYOUTS[request.param], tmp_path, monkeypatch):
        yield request.param


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 30, 4, 16), (2, 30, 2, 16), (2, 30, 2, 16))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


def test_the_newest_version_is_found_and_asked_for_output_and_lse(version: int) -> None:
    assert _dense.flash_version() == version
    assert _dense.order() == (("sdpa", "flash") if version == 2 else ("flash", "sdpa"))
    q, k, v = tensors()
    grid = Grid(2, 3, 5)
    box = Region((0, 0, 0), grid.shape)
    problem = Problem(grid, (full(),), box, box, True, "all", 0.37)
    want, want_lse = reference(q, k, v, problem, Extras())
    out, lse = _dense.flash(q, k, v, 0.37, True)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    alone = _dense.flash(q, k, v, 0.37, False)
    assert isinstance(alone, torch.Tensor)
    torch.testing.assert_close(alone, want)


def test_flash_attn_differentiates_its_output_and_refuses_its_lse(version: int) -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    out = _dense.flash(q, k, v, 0.25, False)
    assert isinstance(out, torch.Tensor)
    assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(out.square().sum(), (q, k, v)))
    with pytest.raises(ValueError, match="does not differentiate the LSE"):
        _dense.flash(q, k, v, 0.25, True)


def test_flash_attn_4_is_preferred_to_the_2_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with importable(LAYOUTS[2] | LAYOUTS[4], tmp_path, monkeypatch):
        assert _dense.flash_version() == 4
