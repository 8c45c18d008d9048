"""Choice of implementation: which of an operation's implementations serves a call, and why the others do not.

An operation lists its implementations in order of preference. Each carries one pure function ``why_not(call)`` over
hashable metadata: None means that it serves the call, a sentence says why it does not. ``auto`` takes the first that
serves. The reference joins ``auto`` on CPU tensors only, so that a slow path is never taken unnoticed on a GPU, and
Triton on CUDA tensors only, since on a CPU it is an interpreter for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import torch

from stattn import ranges

NAMES = ("cuda", "flash", "sdpa", "triton", "reference")


class Call(Protocol):
    """The metadata of one call: a hashable record with at least the device type.

    Those of operations also have the device's compute capability, see ``capability_of``.
    """

    @property
    def device(self) -> str: ...


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    name: one of ``NAMES``. why_not: pure; None when the call is served, else a sentence. run: what computes it.
    """

    name: str
    why_not: Callable[[Any], str | None]
    run: Callable[..., Any]


def serves_all(call: object) -> None:
    """Serve every call, as references do."""


class Operation:
    """A named operation and its implementations, the preferred one first."""

    def __init__(self, name: str, implementations: tuple[Implementation, ...]):
        self.name = name
        self.implementations = implementations
        # Bounded: shapes may enter a call's metadata, and a long-running server sees many.
        self._choose = lru_cache(maxsize=4096)(self._choose_uncached)

    def choose(self, impl: str, call: Hashable) -> Implementation:
        """Pick the implementation for a call.

        Raises TypeError when ``impl`` is no string, ValueError when it is unknown, when the requested one refuses the
        call, or when ``auto`` finds none.
        """
        if not isinstance(impl, str):
            raise TypeError(f"impl={impl!r} must be 'auto' or one of {', '.join(NAMES)}")
        if torch.compiler.is_compiling():  # Dynamo traces the search, not the cache around it
            return self._choose_uncached(impl, call)
        chosen = self._choose(impl, call)
        return replace(chosen, run=ranges.around(self.name, chosen.run)) if ranges.enabled() else chosen

    def table(self, call: Call) -> list[tuple[str, str | None]]:
        """List (implementation, reason it does not serve ``call`` under ``auto`` or None), in order of preference."""
        return [(each.name, self._auto_reason(each, call)) for each in self.implementations]

    def _auto_reason(self, each: Implementation, call: Any) -> str | None:
        reason = each.why_not(call)
        if reason is None and each.name == "reference" and call.device != "cpu":
            return "auto takes the reference on CPU tensors only; ask for it with impl='reference'"
        if reason is None and each.name == "triton" and call.device != "cuda":
            return "auto takes Triton on CUDA tensors only; ask for the interpreter with impl='triton'"
        return reason

    def _choose_uncached(self, impl: str, call: Any) -> Implementation:
        if impl == "auto":
            for each in self.implementations:
                if self._auto_reason(each, call) is None:
                    return each
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.table(call))
            raise ValueError(f"impl='auto': nothing serves {self.name} for this call ({reasons})")
        if impl not in NAMES:
            raise ValueError(f"impl={impl!r} must be 'auto' or one of {', '.join(NAMES)}")
        for each in self.implementations:
            if each.name == impl:
                reason = each.why_not(call)
                if reason is not None:
                    raise ValueError(f"impl={impl!r} does not serve {self.name} for this call: {reason}")
                return each
        have = ", ".join(each.name for each in self.implementations)
        raise ValueError(f"impl={impl!r}: {self.name} has no such implementation; it has {have}")


def capability_of(device: torch.device) -> tuple[int, int]:
    """Give the compute capability of a CUDA device; (0, 0) where there is none."""
    # Dynamo folds what is asked of a device's properties, but traces into a cache instead of using it.
    return _ask_capability(device) if torch.compiler.is_compiling() else _known_capability(device)


def _ask_capability(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda" or not torch.cuda.is_available():
        return (0, 0)
    card = torch.cuda.get_device_properties(device)
    return card.major, card.minor


_known_capability = lru_cache(maxsize=64)(_ask_capability)


def device_of(x: torch.Tensor) -> tuple[str, tuple[int, int]]:
    """Give what calls hold of a tensor's device: its type and its compute capability."""
    return x.device.type, capability_of(x.device)


def lacks(capability: tuple[int, int], needed: tuple[int, int]) -> str:
    """Say that a device's compute capability is not the one needed; (0, 0) stands for a machine without a GPU."""
    if capability == (0, 0):
        return "torch finds no CUDA device"
    return f"needs compute capability {needed[0]}.{needed[1]}, this device has {capability[0]}.{capability[1]}"


def impl_for(impl: str | Mapping[str, str], stem: str) -> str:
    """Return the implementation asked for one stem.

    impl: a name for every operation, or a mapping from stem to name where ``"*"`` stands for the stems not listed.
    """
    if isinstance(impl, str):
        return impl
    return impl.get(stem, impl.get("*", "auto"))
