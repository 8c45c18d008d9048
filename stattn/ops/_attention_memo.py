"""Calls of attention that were checked before: a call like one of them is neither checked nor chosen for again.

Two calls are alike when their *signatures* are equal. A signature holds all that the check and the choice of an
implementation read, but for the values of tensors; it is a few microseconds' work, where they are some fifty. What was
found by a signature twice is then recalled by its *frame*, the part that is about no tensor, and by PyTorch's guards,
which compare tensors with those of before in one call of C++: a microsecond's work.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from stattn import ranges
from stattn.blocks import BlockList
from stattn.grid import Grid, Region
from stattn.masks import Mask
from stattn.problem import Extras, Problem

MOST = 4096  # signatures that are kept: a long-running server sees many
FEW = 8  # calls that are recalled by one frame: all their guards are asked
PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
NO_EXTRAS = Extras()

_keys_of = torch._C._dispatch_keys
_function_modes = torch._C._len_torch_function_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_profiler_enabled = torch._C._autograd._profiler_enabled
_is_grad_enabled = torch.is_grad_enabled
_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
_AUTOGRAD = {"cpu": torch._C.DispatchKey.AutogradCPU, "cuda": torch._C.DispatchKey.AutogradCUDA}


class Known(NamedTuple):
    """What a call is known to be.

    static: the problem as arguments of the operation. run: the implementation's. direct: whether the dispatcher has
    nothing to do for tensors like these but to call it. grad: whether a gradient is needed. launch: what calls the
    kernels past the dispatcher, if there is such a way.
    """

    problem: Problem
    static: tuple[Any, ...]
    name: str
    run: Callable[..., Any]
    direct: bool
    grad: bool
    launch: Callable[..., Any] | None = None


class Alike(NamedTuple):
    """Guards of the tensors of a call, whether they are on a GPU and begin at units of 16 bytes, and what is known."""

    check: Callable[..., bool]
    on_gpu: bool
    aligned: bool
    known: Known


Places = tuple[int, int, int]  # where q, k and v begin


_known: dict[Hashable, Known] = {}
_alike: dict[Hashable, list[Alike]] = {}


def clear() -> None:
    """Forget all calls."""
    _known.clear()
    _alike.clear()


def recall(frame: Hashable, q: Any, k: Any, v: Any, valid: Any) -> tuple[Known | None, Places | None]:
    """Give what is known of a call by its frame and its tensors, if that is found so, and where they begin on a GPU."""
    try:
        calls = _alike.get(frame)
    except TypeError:  # an argument that cannot be hashed is none that the check lets pass
        return None, None
    if calls is None or _function_modes() or _profiler_enabled():
        return None, None
    for check, on_gpu, aligned, known in calls:
        if check(q, k, v) if valid is None else check(q, k, v, valid):
            if not on_gpu:
                return known, None
            places = q_at, k_at, v_at = q.data_ptr(), k.data_ptr(), v.data_ptr()
            if aligned == (not (q_at | k_at | v_at) & 15):
                return known, places
    return None, None


def remember(frame: Hashable, known: Known, q: Any, k: Any, v: Any, valid: Any) -> None:
    """Let a call that was found right, and that nobody looked at, be recalled: guards see to it that nobody does then.

    They are PyTorch's own; without them nothing is recalled.
    """
    guards = getattr(getattr(torch._C._dynamo, "guards", None), "TensorGuards", None)
    tensors = (q, k, v) if valid is None else (q, k, v, valid)
    if guards is None or not all(type(x) in PLAIN for x in tensors):
        return
    try:
        check = guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    except (TypeError, RuntimeError):
        return
    if sum(map(len, _alike.values())) >= MOST:
        _alike.clear()
    calls = _alike.setdefault(frame, [])
    if len(calls) >= FEW:
        calls.clear()
    aligned = is_aligned(places_of(q, k, v))
    calls.append(Alike(check, q.is_cuda, aligned, known))


def places_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Places:
    """Say where tensors begin."""
    return q.data_ptr(), k.data_ptr(), v.data_ptr()


def is_aligned(places: Places) -> bool:
    """Say whether tensors begin where the CUDA kernels ask them to; which of them does not is of no account here."""
    return not (places[0] | places[1] | places[2]) & 15


def find(signature: Hashable) -> Known | None:
    """Give what is known of a signature, if anything."""
    try:
        return _known.get(signature)
    except TypeError:  # an argument that cannot be hashed is none that the check lets pass
        return None


def keep(signature: Hashable, known: Known) -> None:
    """Remember a call that was found right."""
    if len(_known) >= MOST:
        _known.clear()
    _known[signature] = known


def frame(
    grid: Any,
    mask: Any,
    q_region: Any,
    k_region: Any,
    valid: bool,
    globals_see: Any,
    scale: Any,
    impl: Any,
    deterministic: bool,
) -> tuple[Any, ...] | None:
    """Gather all that is read of a call but its tensors; None for a call that is to be checked always.

    valid: whether the call says which global tokens are real. Values that are equal but of other types (2 and 2.0, 1
    and True) are told apart: not all of them are right.
    """
    if type(grid) is tuple and len(grid) == 3:
        kinds: Any = tuple(map(type, grid))
        places: Any = grid
    elif type(grid) is Grid:
        kinds, places = None, (grid.t, grid.h, grid.w, grid.before, grid.after)
    else:
        return None
    seen = mask.key if type(mask) is Mask else _mask_signature(mask)
    if seen is None or (scale is not None and type(scale) is not float and type(scale) is not int):
        return None
    regions: Any = None
    if q_region is not None or k_region is not None:
        regions = (_region(q_region), _region(k_region))
        if False in regions:
            return None
    modes = deterministic, ranges.enabled(), _is_grad_enabled()  # what was chosen without ranges opens none
    return places, kinds, seen, regions, valid, globals_see, scale, impl, modes


def signature(frame: tuple[Any, ...], q: Any, k: Any, v: Any, k_frames: Any, valid: Any) -> tuple[Any, ...] | None:
    """Gather all that is read of a call but the values of its tensors; None for a call that is to be checked always."""
    if type(q) not in PLAIN or type(k) not in PLAIN or type(v) not in PLAIN or _transforms_active():
        return None
    rest: Any = None
    if k_frames is not None or valid is not None:
        rest = (_tensor(k_frames), _tensor(valid))
        if False in rest:
            return None
    try:
        if q.is_neg() or k.is_neg() or v.is_neg() or q._is_zerotensor() or k._is_zerotensor() or v._is_zerotensor():
            return None  # tensors by name alone: the dispatcher makes them up
        return (
            *frame,
            q.shape,
            k.shape,
            v.shape,
            q.stride(),
            k.stride(),
            v.stride(),
            q.dtype,
            k.dtype,
            v.dtype,
            q.device,
            k.device,
            v.device,
            not q.is_cuda or is_aligned(places_of(q, k, v)),
            rest,
            q.requires_grad or k.requires_grad or v.requires_grad,
        )
    except RuntimeError:  # nested tensors have no shape, tensors of other layouts may have no strides
        return None


def _mask_signature(mask: Any) -> Hashable | None:
    if type(mask) is tuple or type(mask) is list:
        return tuple([each.key for each in mask]) if {Mask}.issuperset(map(type, mask)) else None
    if type(mask) is not BlockList:
        return None
    count, index, partial = _tensor(mask.count), _tensor(mask.index), _tensor(mask.partial)
    if False in (count, index, partial):
        return None
    return (mask.shape, mask.q_tile, mask.k_tile, count, index, partial, None if mask.mask is None else mask.mask.key)


def _region(region: Any) -> Hashable:
    """Describe a region, None for none; False for what is not one."""
    if region is None:
        return None
    return (region.origin, region.extent) if type(region) is Region else False


def _tensor(x: Any) -> Hashable:
    """Describe a tensor beside q, k and v, None for none; False for what is not a plain one."""
    if x is None:
        return None
    return (x.shape, x.dtype, x.device, _keys_of(x).raw_repr()) if type(x) in PLAIN else False


def direct(*tensors: torch.Tensor | None) -> bool:
    """Say whether tensors are such that the dispatcher does nothing but to call a CPU or CUDA implementation."""
    given = [x for x in tensors if x is not None]
    return all(_only_a_device(_keys_of(x).raw_repr(), x.device.type) for x in given)


@lru_cache(maxsize=256)
def _only_a_device(keys: int, device: str) -> bool:
    """Say whether dispatch keys are those of a strided tensor of a CPU or a GPU: no lazy negation, no wrapper."""
    if device not in _AUTOGRAD:
        return False
    plain = _keys_of(torch.empty(0, device=device))
    with torch.inference_mode():
        inference = _keys_of(torch.empty(0, device=device))
    return keys in (plain.raw_repr(), inference.raw_repr())


def nobody_looks(device: torch.device, grad: bool) -> bool:
    """Say whether no mode, tracer or profiler wants to see operations, and autograd works as usual."""
    if _function_modes() or _dispatch_modes() or _profiler_enabled():
        return False
    return _tracing_state() is None and not (grad and _excluded(_AUTOGRAD[device.type]))
