"""The arguments of attention: each bad one is refused by its name and value."""

from __future__ import annotations

import dataclasses
import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import stattn
from stattn import extension, masks
from stattn.blocks import lower
from stattn.grid import Grid, Region

GRID = Grid(2, 3, 4)


def call(**changes: Any) -> torch.Tensor:
    given: dict[str, Any] = {name: torch.randn(2, 24, 2, 8) for name in "qkv"} | {"grid": GRID}
    return stattn.attention(**(given | changes))


def test_a_good_call_works() -> None:
    assert call().shape == (2, 24, 2, 8)
    assert call(mask=masks.window(2, 3, 3), scale=0.5, deterministic=True, impl="reference").shape == (2, 24, 2, 8)
    assert call(grid=Grid(2, 3, 3, 2, 4), valid=torch.ones(2, 6, dtype=torch.bool)).shape == (2, 24, 2, 8)


BAD = {
    "q of another rank": (ValueError, r"q has shape \(2, 24, 8\)", {"q": torch.zeros(2, 24, 8)}),
    "k of another dtype": (
        TypeError,
        "k has dtype torch.float64, q torch.float32",
        {"k": torch.zeros(2, 24, 2, 8).double()},
    ),
    "heads before tokens": (
        ValueError,
        r"q has 2 tokens, .* 2\*3\*4 = 24; q is \[B, N, heads, D\]: transpose\(1, 2\)",
        {name: torch.zeros(2, 2, 24, 8) for name in "qkv"},
    ),
    "an impl that is no name": (TypeError, r"impl=\['cuda'\] must be 'auto' or one of", {"impl": ["cuda"]}),
    "an integer q": (TypeError, "q has dtype torch.int64", {"q": torch.zeros(2, 24, 2, 8, dtype=torch.long)}),
    "k on another device": (ValueError, "k is on meta, q on cpu", {"k": torch.zeros(2, 24, 2, 8, device="meta")}),
    "another batch": (ValueError, "v has a batch of 1, q of 2", {"v": torch.zeros(1, 24, 2, 8)}),
    "another head dimension": (ValueError, "k has head dimension 16, q 8", {"k": torch.zeros(2, 24, 2, 16)}),
    "heads that do not divide": (
        ValueError,
        "k has 3 heads",
        {"k": torch.zeros(2, 24, 3, 8), "v": torch.zeros(2, 24, 3, 8)},
    ),
    "keys of no heads": (
        ValueError,
        "k has 0 heads",
        {"k": torch.zeros(2, 24, 0, 8), "v": torch.zeros(2, 24, 0, 8)},
    ),
    "k and v of other lengths": (ValueError, "v has shape", {"v": torch.zeros(2, 23, 2, 8)}),
    "strides": (ValueError, "q has strides", {"q": torch.zeros(2, 24, 8, 2).transpose(2, 3)}),
    "a list for q": (TypeError, "q=list must be a tensor", {"q": [1.0]}),
    "another grid product": (
        ValueError,
        r"q has 24 tokens, but its part of grid \(2, 3, 5\) has 2\*3\*5 = 30",
        {"grid": (2, 3, 5)},
    ),
    "too few global tokens": (ValueError, "k has 24 tokens", {"grid": Grid(2, 3, 4, 0, 2)}),
    "a grid of two": (TypeError, r"grid=\(6, 4\)", {"grid": (6, 4)}),
    "a grid with zero": (ValueError, "Grid h=0", {"grid": (2, 0, 4)}),
    "a window over its axis": (ValueError, "window t=3", {"mask": masks.window(3, 3, 3)}),
    "a mask by name": (TypeError, "mask='full'", {"mask": "full"}),
    "too few masks": (ValueError, "mask is a sequence of 1 masks, q has 2 heads", {"mask": [masks.full()]}),
    "a list in the sequence": (TypeError, "mask=", {"mask": [masks.full(), None]}),
    "lists of another grid": (
        ValueError,
        "block lists are for a grid",
        {"mask": lower(masks.full(), (2, 4, 4), (1, 2, 2), (1, 2, 2))},
    ),
    "lists with a region": (
        ValueError,
        "block lists take the whole grid",
        {"mask": lower(masks.full(), (2, 3, 4), (1, 2, 2), (1, 2, 2)), "q_region": Region((0, 0, 0), (2, 3, 4))},
    ),
    "a region outside": (ValueError, "q_region=", {"q_region": Region((1, 0, 0), (2, 3, 4))}),
    "a region of a tuple": (TypeError, "k_region=", {"k_region": (0, 0, 0)}),
    "k_frames of floats": (TypeError, "k_frames=", {"k_frames": torch.zeros(2)}),
    "k_frames of no slots": (ValueError, "k_frames has no slots", {"k_frames": torch.zeros(0, dtype=torch.int32)}),
    "k_frames beyond": (ValueError, r"k_frames=\[0, 2\]", {"k_frames": torch.tensor([0, 2], dtype=torch.int32)}),
    "k_frames twice": (ValueError, r"k_frames=\[1, 1\]", {"k_frames": torch.tensor([1, 1], dtype=torch.int32)}),
    "k_frames beside a region of the first frames": (
        ValueError,
        "k_region=",
        {"k_frames": torch.tensor([0, 1], dtype=torch.int32), "k_region": Region((0, 0, 0), (1, 3, 4))},
    ),
    "k_frames beside a region of frames": (
        ValueError,
        "k_region=",
        {"k_frames": torch.tensor([0, 1], dtype=torch.int32), "k_region": Region((1, 0, 0), (1, 3, 4))},
    ),
    "valid of floats": (TypeError, "valid has dtype", {"grid": Grid(2, 3, 3, 0, 6), "valid": torch.ones(2)}),
    "valid of another shape": (
        ValueError,
        "valid has shape",
        {"grid": Grid(2, 3, 3, 0, 6), "valid": torch.ones(2, 5, dtype=torch.bool)},
    ),
    "valid counts too high": (
        ValueError,
        "valid has counts from 0 to 7",
        {"grid": Grid(2, 3, 3, 0, 6), "valid": torch.tensor([0, 7])},
    ),
    "valid counts on both sides": (
        ValueError,
        "counts are ambiguous",
        {"grid": Grid(2, 3, 3, 2, 4), "valid": torch.tensor([0, 1])},
    ),
    "globals_see": (ValueError, "globals_see='none'", {"globals_see": "none"}),
    "scale": (ValueError, "scale=nan", {"scale": float("nan")}),
    "a scale of text": (TypeError, "scale='1'", {"scale": "1"}),
    "a scale of truth": (TypeError, "scale=True", {"scale": True}),
    "deterministic": (TypeError, "deterministic=1", {"deterministic": 1}),
    "return_lse": (TypeError, "return_lse='yes'", {"return_lse": "yes"}),
    "an unknown impl": (ValueError, "impl='fast'", {"impl": "fast"}),
    "an impl without masks": (
        ValueError,
        "impl='sdpa' does not serve attention for this call: serves dense attention only",
        {"impl": "sdpa", "mask": masks.spatial()},
    ),
    "an impl that is not there": (ValueError, "impl='flash' does not serve attention", {"impl": "flash"}),
    "an unknown keyword": (TypeError, "dropout", {"dropout": 0.1}),
}


@pytest.mark.parametrize("scale", [1, np.float32(0.5), np.int64(2), Fraction(1, 4)])
def test_the_scale_may_be_any_real_number(scale: Any) -> None:
    tensors = torch.randn(3, 2, 24, 2, 8).unbind()
    want = stattn.attention(*tensors, GRID, scale=float(scale))
    assert torch.equal(stattn.attention(*tensors, GRID, scale=scale), want)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_explain_says_where_there_is_no_gpu() -> None:
    said = stattn.explain(*torch.zeros(3, 1, 24, 2, 16, dtype=torch.bfloat16).unbind(), GRID, device="cuda")
    assert "auto takes nothing" in said
    assert said.count("torch finds no CUDA device") == 3  # cuda, sdpa and triton


def test_explain_refuses_what_is_no_device() -> None:
    tensors = torch.zeros(3, 1, 24, 2, 8).unbind()
    assert "auto takes" in stattn.explain(*tensors, GRID, device="cuda")
    with pytest.raises(ValueError, match="device='tpu' is no device"):
        stattn.explain(*tensors, GRID, device="tpu")


def test_explain_answers_for_a_gpu_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "why_not", lambda device=None: None)  # as where the library is built
    grid = (4, 8, 8)
    tensors = torch.empty(3, 1, 256, 2, 64, dtype=torch.bfloat16, device="meta").unbind()
    said = {version: stattn.explain(*tensors, grid, capability=version) for version in ((9, 0), (8, 0), (7, 5))}
    assert said[9, 0].startswith("stattn.attention on a GPU of capability 9.0: auto takes cuda\n")
    assert "cuda       needs compute capability 9.0, this device has 8.0" in said[8, 0]
    assert "triton     needs compute capability 8.0, this device has 7.5" in said[7, 5]
    assert stattn.explain(*tensors, grid, device="cuda", capability=(9, 0)) == said[9, 0]


@pytest.mark.parametrize("capability", [9.0, (9,), (9, 0, 0), (9, -1), (True, 0), "9.0", [9, 0]])
def test_explain_refuses_what_is_no_capability(capability: Any) -> None:
    tensors = torch.zeros(3, 1, 24, 2, 8).unbind()
    with pytest.raises(ValueError, match=re.escape(f"capability={capability!r} must be a pair of integers")):
        stattn.explain(*tensors, GRID, capability=capability)


def test_explain_refuses_the_capability_of_a_cpu() -> None:
    tensors = torch.zeros(3, 1, 24, 2, 8).unbind()
    with pytest.raises(ValueError, match=r"capability=\(9, 0\) is that of a GPU, device='cpu' is none"):
        stattn.explain(*tensors, GRID, device="cpu", capability=(9, 0))


def test_a_mask_that_does_not_fit_is_refused_where_nothing_is_computed() -> None:
    wide = masks.window(3, 3, 3)
    with pytest.raises(ValueError, match="window t=3"):
        stattn.explain(*torch.zeros(3, 1, 24, 2, 8).unbind(), GRID, wide)
    with pytest.raises(ValueError, match="window t=3"):
        stattn.attention(*torch.zeros(3, 0, 24, 2, 8).unbind(), GRID, [masks.full(), wide])
    lists = lower(masks.full(), GRID, (1, 3, 2), (1, 3, 2))
    spoiled = dataclasses.replace(lists, partial=torch.zeros_like(lists.index, dtype=torch.bool), mask=wide)
    with pytest.raises(ValueError, match="window t=3"):
        stattn.attention(*torch.zeros(3, 0, 24, 2, 8).unbind(), GRID, spoiled)


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_by_name(what: str) -> None:
    kind, message, changes = BAD[what]
    with pytest.raises(kind, match=message):
        call(**changes)
