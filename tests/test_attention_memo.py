"""Warm calls of attention: what was checked once is not checked again, and what is new always is."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_attention_arguments import BAD
from torch.utils._python_dispatch import TorchDispatchMode

import stattn
from stattn import masks, ranges
from stattn.blocks import BlockList, lower
from stattn.grid import Grid, Region
from stattn.ops import _attention_memo as memo
from stattn.problem import Problem

ATTENTION: dict[str, Any] = stattn.attention.__globals__  # not by its dotted name, which is that of the function
GRID = Grid(2, 3, 4)
TEXT = Grid(2, 3, 3, 0, 6)
LISTS = lower(masks.window(1, 3, 3), GRID, (1, 3, 2), (1, 3, 2))


@pytest.fixture(autouse=True)
def cold() -> Iterator[None]:
    memo.clear()
    yield
    memo.clear()


def arguments(**changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    given: dict[str, Any] = {name: torch.randn(2, 24, 2, 8, generator=generator) for name in "qkv"} | {"grid": GRID}
    return given | changes


def call(**changes: Any) -> torch.Tensor:
    return stattn.attention(**arguments(**changes))


def warm(**changes: Any) -> None:
    for _ in range(2):
        call(**changes)


def refuse(*given: Any, **named: Any) -> None:
    raise AssertionError("a warm call was checked, or chosen for, again")


WARM = {
    "dense": {},
    "a tuple for the grid": {"grid": (2, 3, 4)},
    "a mask": {"mask": masks.window(1, 3, 3)},
    "a mask for each head": {"mask": [masks.window(1, 3, 3), masks.full()]},
    "block lists": {"mask": LISTS},
    "regions": {"q_region": Region((0, 0, 0), (2, 3, 4)), "k_region": Region((0, 0, 0), (2, 3, 4))},
    "k_frames": {"k_frames": torch.tensor([1, 0], dtype=torch.int32)},
    "booleans": {"grid": TEXT, "valid": torch.ones(2, 6, dtype=torch.bool)},
    "counts": {"grid": TEXT, "valid": torch.tensor([1, 6])},
    "an implementation": {"impl": "reference"},
    "a scale": {"scale": 0.5},
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("what", WARM)
def test_a_warm_call_is_neither_checked_nor_chosen_for_again(
    monkeypatch: pytest.MonkeyPatch, what: str, grad: bool
) -> None:
    given = arguments(**WARM[what])
    given["q"].requires_grad_(grad)
    first = stattn.attention(**given)
    monkeypatch.setitem(ATTENTION, "_check", refuse)
    monkeypatch.setattr(ATTENTION["OPERATION"], "choose", refuse)
    # Other tensors, and values made anew.
    again = stattn.attention(**{name: copy.deepcopy(value) for name, value in given.items()})
    assert torch.equal(again, first)
    assert again.requires_grad == grad


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_after_warm_calls(what: str) -> None:
    kind, message, changes = BAD[what]
    warm()
    for rest in ({}, {"mask": masks.window(2, 3, 3)}, {"scale": 1.0}, {"grid": TEXT, "valid": torch.tensor([0, 6])}):
        warm(**rest)
    for _ in range(2):  # nor is what was refused once taken for right
        with pytest.raises(kind, match=message):
            call(**changes)


def strided() -> torch.Tensor:
    return torch.zeros(2, 24, 8, 2).transpose(2, 3)


SPOILED: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "a stride of q": ({}, {"q": strided()}, ValueError, "q has strides"),
    "a stride of k": ({}, {"k": strided()}, ValueError, "k has strides"),
    "a stride of v": ({}, {"v": strided()}, ValueError, "v has strides"),
    "the dtype of v": ({}, {"v": torch.zeros(2, 24, 2, 8).half()}, TypeError, "v has dtype torch.float16"),
    "the device of v": ({}, {"v": torch.zeros(2, 24, 2, 8, device="meta")}, ValueError, "v is on meta"),
    "a float in the grid": ({"grid": (2, 3, 4)}, {"grid": (2, 3, 4.0)}, TypeError, r"Grid w=4\.0"),
    "a truth in the grid": ({"grid": (1, 6, 4)}, {"grid": (True, 6, 4)}, TypeError, "Grid t=True"),
    "a scale that is a truth": ({"scale": 1}, {"scale": True}, TypeError, "scale=True"),
    "a scale that is a tensor": ({"scale": 1.0}, {"scale": torch.tensor(1.0)}, TypeError, "scale=tensor"),
    "a key for a mask": ({"mask": masks.full()}, {"mask": "full()"}, TypeError, "mask='full"),
    "keys for masks": ({"mask": [masks.full()] * 2}, {"mask": ["full()"] * 2}, TypeError, "mask="),
    "a pair for a region": (
        {"q_region": Region((0, 0, 0), (2, 3, 4))},
        {"q_region": ((0, 0, 0), (2, 3, 4))},
        TypeError,
        "q_region=",
    ),
    "the dtype of k_frames": (
        {"k_frames": torch.tensor([0, 1], dtype=torch.int32)},
        {"k_frames": torch.tensor([0, 1])},
        TypeError,
        "k_frames=",
    ),
    "the values of k_frames": (
        {"k_frames": torch.tensor([0, 1], dtype=torch.int32)},
        {"k_frames": torch.tensor([0, 2], dtype=torch.int32)},
        ValueError,
        r"k_frames=\[0, 2\]",
    ),
    "the device of valid": (
        {"grid": TEXT, "valid": torch.tensor([1, 6])},
        {"grid": TEXT, "valid": torch.tensor([1, 6], device="meta")},
        ValueError,
        "valid is on meta",
    ),
    "the values of valid": (
        {"grid": TEXT, "valid": torch.tensor([1, 6])},
        {"grid": TEXT, "valid": torch.tensor([1, 7])},
        ValueError,
        "valid has counts from 1 to 7",
    ),
    "the shape of valid": (
        {"grid": TEXT, "valid": torch.tensor([1, 6])},
        {"grid": TEXT, "valid": torch.tensor([1, 6, 6])},
        ValueError,
        "valid has shape",
    ),
    "the dtype of valid": (
        {"grid": TEXT, "valid": torch.tensor([1, 6])},
        {"grid": TEXT, "valid": torch.tensor([1.0, 6.0])},
        TypeError,
        "valid has dtype",
    ),
    "lists for other heads": (
        {"mask": LISTS},
        {
            "mask": BlockList(
                LISTS.shape, LISTS.q_tile, LISTS.k_tile, LISTS.count.expand(1, 3, -1), LISTS.index.expand(1, 3, -1, -1)
            )
        },
        ValueError,
        "block lists are for heads of 3",
    ),
    "globals_see": ({}, {"globals_see": ["all"]}, ValueError, "globals_see="),
    "impl": ({"impl": "reference"}, {"impl": ["reference"]}, TypeError, r"impl=\['reference'\] must be"),
    "a mask that an impl does not serve": (
        {"impl": "sdpa"},
        {"mask": masks.spatial()},
        ValueError,
        "impl='sdpa' does not serve attention for this call",
    ),
    "deterministic": ({"deterministic": True}, {"deterministic": 1}, TypeError, "deterministic=1"),
    "return_lse": ({"return_lse": False}, {"return_lse": 0}, TypeError, "return_lse=0"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_change_of_any_argument_of_a_warm_call_is_checked(what: str) -> None:
    right, changes, kind, message = SPOILED[what]
    warm(**right)
    for _ in range(2):
        with pytest.raises(kind, match=message):
            call(**(right | changes))
    call(**right)  # which is as right as before


def test_values_that_change_in_place_are_checked() -> None:
    valid, frames = torch.tensor([1, 6]), torch.tensor([0, 1], dtype=torch.int32)
    warm(grid=TEXT, valid=valid)
    few = call(grid=TEXT, valid=valid)
    valid.fill_(6)
    assert not torch.equal(call(grid=TEXT, valid=valid), few)
    valid.fill_(7)
    with pytest.raises(ValueError, match="valid has counts from 7 to 7"):
        call(grid=TEXT, valid=valid)
    warm(k_frames=frames)
    frames.fill_(1)
    with pytest.raises(ValueError, match=r"k_frames=\[1, 1\]"):
        call(k_frames=frames)


CHANGES: dict[str, dict[str, Any]] = {
    "mask": {"mask": masks.window(1, 3, 3)},
    "another mask": {"mask": masks.window(1, 1, 3)},
    "heads' masks": {"mask": [masks.full(), masks.spatial()]},
    "heads' masks in another order": {"mask": [masks.spatial(), masks.full()]},
    "lists": {"mask": LISTS},
    "whole lists": {"mask": lower(masks.full(), GRID, (1, 3, 2), (1, 3, 2))},
    "scale": {"scale": 0.25},
    "a scale below zero": {"scale": -0.25},
    "another grid": {"grid": (1, 4, 6), "mask": masks.window(1, 1, 3)},
    "a grid in another order": {"grid": (1, 6, 4), "mask": masks.window(1, 1, 3)},
    "globals": {"grid": TEXT, "mask": masks.spatial()},
    "globals before": {"grid": Grid(2, 3, 3, 6, 0), "mask": masks.spatial()},
    "globals_see": {"grid": TEXT, "globals_see": "globals"},
    "valid": {"grid": TEXT, "valid": torch.tensor([1, 3])},
    "valid booleans": {"grid": TEXT, "valid": torch.tensor([[True] * 3 + [False] * 3] * 2)},
    "regions": {"k_region": Region((0, 0, 0), (2, 3, 4)), "mask": masks.spatial()},
    "k_frames": {"k_frames": torch.tensor([1, -1], dtype=torch.int32)},
    "fewer key heads": {"k": torch.ones(2, 24, 1, 8), "v": torch.randn(2, 24, 1, 8)},
    "another order of k": {"k": torch.randn(2, 2, 24, 8).transpose(1, 2)},
    "dtype": {name: torch.randn(2, 24, 2, 8).double() for name in "qkv"},
}


def test_every_change_of_a_warm_call_gives_what_a_cold_one_does() -> None:
    cold = {}
    for name, changes in CHANGES.items():
        memo.clear()
        cold[name] = call(**changes)
    memo.clear()
    for _ in range(2):
        for name, changes in CHANGES.items():
            assert torch.equal(call(**changes), cold[name]), name
    assert len(memo._known) == len(CHANGES)


def test_where_a_tensor_starts_is_part_of_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the CUDA kernels; on a CPU nothing asks for it."""
    frame = memo.frame(GRID, masks.full(), None, None, False, "all", None, "auto", False)
    assert frame is not None
    given: list[Any] = [*torch.zeros(3, 1, 24, 2, 8).unbind()]
    odd = torch.zeros(1 * 24 * 2 * 8 + 1)[1:].view(1, 24, 2, 8)
    call()
    (known,) = memo._known.values()
    memo._alike.clear()
    memo.remember(frame, known, *given, None)
    assert memo.signature(frame, *given, None, None) == memo.signature(frame, odd, *given[1:], None, None)
    assert memo.recall(frame, odd, *given[1:], None) == (known, None)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    memo._alike.clear()
    memo.remember(frame, known, *given, None)
    assert memo.recall(frame, *given, None) == (known, memo.places_of(*given))
    for place in range(3):
        moved = [*given[:place], odd, *given[place + 1 :]]
        assert memo.signature(frame, *given, None, None) != memo.signature(frame, *moved, None, None)
        assert memo.recall(frame, *moved, None) == (None, None)


GUARDED = {
    "a shape": lambda q: q[:1],
    "strides": lambda q: q.transpose(1, 2).contiguous().transpose(1, 2),
    "a dtype": lambda q: q.double(),
    "a device": lambda q: q.to("meta"),
    "a gradient": lambda q: q.clone().requires_grad_(),
    "a type": lambda q: torch.nn.Parameter(q, requires_grad=False),
    "a negation": torch._neg_view,
    "a layout": lambda q: q.to_sparse(),
    "no tensor": lambda q: q.tolist(),
}


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("what", GUARDED)
def test_what_is_recalled_is_of_tensors_like_those_before(what: str, place: int) -> None:
    frame = memo.frame(TEXT, masks.full(), None, None, True, "all", None, "auto", False)
    given: list[Any] = [*torch.randn(4, 2, 24, 2, 8).unbind()]
    call()
    (known,) = memo._known.values()
    memo.remember(frame, known, *given)
    assert memo.recall(frame, *[x.clone() for x in given]) == (known, None)
    given[place] = GUARDED[what](given[place])
    assert memo.recall(frame, *given) == (None, None)


def test_a_warm_call_is_recalled(monkeypatch: pytest.MonkeyPatch) -> None:
    warm()
    monkeypatch.setattr(memo, "signature", refuse)
    call()
    with pytest.raises(AssertionError, match="again"):
        call(mask=masks.window(1, 3, 3))
    with pytest.raises(AssertionError, match="again"), torch.no_grad():
        call()  # whether gradients are wanted is no tensor's matter


def test_calls_of_one_frame_are_recalled_each() -> None:
    sizes = [1, 2, 3, 4]
    want = {batch: call(**{name: torch.ones(batch, 24, 2, 8) for name in "qkv"}) for batch in sizes}
    for _ in range(3):
        for batch in sizes:
            assert torch.equal(call(**{name: torch.ones(batch, 24, 2, 8) for name in "qkv"}), want[batch])
    (calls,) = memo._alike.values()
    assert len(calls) == len(sizes)
    for batch in range(5, 5 + 2 * memo.FEW):
        warm(**{name: torch.ones(batch, 24, 2, 8) for name in "qkv"})
        assert len(calls) <= memo.FEW


def test_a_subclass_is_checked_always_and_seen_by_the_dispatcher() -> None:
    seen = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return super().__torch_function__(function, types, args, kwargs or {})

    warm()
    given = arguments()
    given["q"] = given["q"].as_subclass(Watched)
    stattn.attention(**given)
    assert any("stattn.attention" in each for each in seen)


def test_modes_see_one_operation_of_a_warm_call() -> None:
    names = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    warm()
    given = arguments()
    with Mode():
        stattn.attention(**given)
    assert names == ["stattn.attention.default"]


def test_the_profiler_names_the_operation() -> None:
    from torch.profiler import ProfilerActivity, profile

    warm()
    with profile(activities=[ProfilerActivity.CPU]) as run:
        call()
    assert "stattn::attention" in {event.name for event in run.events()}


def test_fake_tensors_compute_nothing() -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    warm()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert isinstance(call(**{name: mode.from_tensor(torch.randn(2, 24, 2, 8)) for name in "qkv"}), FakeTensor)


def test_a_sparse_tensor_is_refused_after_warm_calls() -> None:
    warm()
    with pytest.raises((RuntimeError, ValueError), match="strides"):
        call(q=torch.zeros(2, 24, 2, 8).to_sparse())


def test_lazily_negated_tensors_are_negated() -> None:
    given = arguments()
    want = stattn.attention(**given)
    warm()
    twin = torch.complex(torch.zeros_like(given["q"]), -given["q"]).conj().imag  # q, by a bit that says "negate"
    assert twin.is_neg()
    twin = twin if twin.stride(3) == 1 else torch._neg_view(-given["q"])
    assert torch.equal(stattn.attention(**(given | {"q": twin})), want)


def test_gradients_of_a_warm_call_are_those_of_the_operation() -> None:
    def gradients(watch: Callable[[], Any]) -> list[torch.Tensor]:
        given = arguments(mask=masks.window(1, 3, 3), return_lse=True)
        leaves = [given[name].requires_grad_() for name in "qkv"]
        with watch():
            out, lse = stattn.attention(**given)
        return list(torch.autograd.grad(out.square().sum() + lse.sum(), leaves))

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return function(*args, **(kwargs or {}))

    want = gradients(Seen)
    for got in (gradients(torch.enable_grad), gradients(torch.enable_grad)):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_nothing_is_remembered_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memo, "MOST", 4)
    for number in range(1, 12):
        warm(scale=float(number))
        assert len(memo._known) <= 4
        assert sum(map(len, memo._alike.values())) <= 4


def test_a_problem_keeps_its_hash_to_its_process() -> None:
    box = Region((0, 0, 0), GRID.shape)
    problem, twin = (Problem(GRID, (masks.full(),), box, box, True, "all", 0.5) for _ in range(2))
    assert hash(problem) == hash(twin)
    assert problem == twin
    kept = pickle.loads(pickle.dumps(problem))
    assert "_hash" not in vars(kept)
    assert (kept, hash(kept)) == (problem, hash(problem))


def test_ranges_that_are_switched_on_later_are_seen_by_warm_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    warm()
    opened: list[str] = []

    @contextmanager
    def note(name: str) -> Iterator[None]:
        opened.append(name)
        yield

    monkeypatch.setattr(ranges, "_open", note)
    warm()
    assert opened == ["stattn.attention"] * 2
    monkeypatch.setattr(ranges, "_open", None)
    warm()
    assert len(opened) == 2
