"""A whole sample as one CUDA graph: ``SampleGraph``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stattn.sampler import Inputs, Pass, prepare

# What may differ between the samples of a graph. Noise alone must be given anew.
TENSORS = ("text", "text_valid", "negative", "negative_valid", "known", "generated")
RANDOM = ("noise", "seed", "generator")


class SampleGraph:
    """Capture the loop of `stattn.sampler.sample` once, and replay it for many samples of one shape.

    Arguments are those of ``sample`` without ``callback``. During a replay the host only copies the sample's tensors
    in: timesteps, coefficients, masks, the choice of kernels and the number of steps are fixed in the graph. Weights
    are read in place: changing them in place takes effect, and the model must not be moved. ``video`` is what the last
    replay wrote.

    cuBLAS clears a workspace before its large products, in a graph node of its own that leaves the GPU idle for 5 to
    12 us. If CUBLASLT_WORKSPACE_SIZE=0 is in the environment before the process's first matrix product, cuBLAS takes
    kernels that need no workspace and are as fast: `stattn bench sampler` measures samples that way.

    Capturing runs a few steps first, so that kernels are compiled and plans are made. Raises ValueError on any device
    but CUDA (call ``sample`` there), RuntimeError for a model that cannot be captured, such as one that waits for the
    device, and what ``sample`` raises.

    >>> graph = SampleGraph(model, (1, 16, 21, 60, 104), text=text, steps=FlowMatching(50, shift=5.0), prediction="v")
    >>> video = graph(seed=7, text=another)
    """

    @torch.no_grad()
    def __init__(self, model: Callable[..., Tensor], shape: Sequence[int], **options: Any):
        self._model, self._shape = model, tuple(shape)
        self._options = {name: value for name, value in options.items() if name not in RANDOM}
        walk, inputs = prepare(model, shape, **options)
        device = inputs.noise.device
        if device.type != "cuda":
            raise ValueError(f"device={str(device)!r}: graphs are captured on CUDA devices; sample() runs on any")
        self._walk, self._inputs = walk, _map(torch.clone, inputs)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                walk(walk.encode(self._inputs), only=self._rehearsed())
            torch.cuda.synchronize()
            try:
                with torch.cuda.graph(self._graph, stream=stream):
                    self.video = walk(walk.encode(self._inputs))
            except RuntimeError as error:
                # A capture that fails leaves the device's generator believing that it goes on.
                generator = torch.cuda.default_generators[torch.cuda.current_device()]
                generator.graphsafe_set_state(generator.clone_state())
                name = type(model).__name__
                raise RuntimeError(f"model {name} cannot be captured in a CUDA graph, sample() it: {error}") from error

    @torch.no_grad()
    def __call__(self, **given: Any) -> Tensor:
        """Sample. given: noise, seed or generator as for ``sample``, and other tensors than the graph was made with.

        Those that are not given stay what they were at the last call. Raises TypeError for keywords that the graph
        fixes, ValueError for tensors that it was not made for.
        """
        fixed = [name for name in given if name not in (*TENSORS, *RANDOM)]
        if fixed:
            raise TypeError(f"{', '.join(fixed)}: a graph takes {', '.join((*TENSORS, *RANDOM))}; the rest is fixed")
        options = self._options | {name: value for name, value in given.items() if name in TENSORS}
        _, inputs = prepare(self._model, self._shape, **options, **{n: v for n, v in given.items() if n in RANDOM})
        here, new = _tensors(self._inputs), _tensors(inputs)
        for (name, place), (_, tensor) in zip(here, new, strict=True):
            if place is None and tensor is None:
                continue
            if place is None or tensor is None or place.shape != tensor.shape or place.dtype != tensor.dtype:
                raise ValueError(f"{name} is {_describe(tensor)}, the graph was made for {_describe(place)}")
        for (_, place), (_, tensor) in zip(here, new, strict=True):
            if place is not None and tensor is not None:
                place.copy_(tensor)
        self._options = options
        self._graph.replay()
        return self.video.clone()

    def replay(self) -> None:
        """Sample again from what was given last, into ``video``."""
        self._graph.replay()

    def _rehearsed(self) -> set[int]:
        """Choose the steps that together launch every kernel: one for each mask, and those at the ends.

        A solver's history is complete in the third.
        """
        last = len(self._walk.levels) - 2
        seen: list[Any] = []
        steps = {0, min(1, last), min(2, last), last}
        for step in range(last + 1):
            mask = self._walk.mask_at(step)
            if mask not in seen:
                seen.append(mask)
                steps.add(step)
        return steps


def _map(call: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    def each(x: Tensor | None) -> Tensor | None:
        return None if x is None else call(x)

    passes = tuple(Pass(copies, each(text), each(valid)) for copies, text, valid in inputs.passes)
    return Inputs(call(inputs.noise), passes, each(inputs.known), each(inputs.generated))


def _tensors(inputs: Inputs) -> list[tuple[str, Tensor | None]]:
    texts = [pair for each in inputs.passes for pair in (("text", each.text), ("text_valid", each.valid))]
    return [("noise", inputs.noise), *texts, ("known", inputs.known), ("generated", inputs.generated)]


def _describe(tensor: Tensor | None) -> str:
    return "not given" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
