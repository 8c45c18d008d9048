"""What the accelerated layers of another library's transformer share, and the attention that they call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stattn import masks
from stattn.grid import Grid, Region, Triple
from stattn.masks import Mask
from stattn.model.layers import Report
from stattn.model.settings import Impl, Masks, density, describe_mask
from stattn.ops._dispatch import impl_for
from stattn.ops.attention import attention, explain
from stattn.rope import RopeTables


@dataclass(frozen=True)
class HostLayerReport:
    """One self-attention layer of a transformer: its mask, and what its last call was.

    density, grid: of the last forward pass, None before the first. impl: what computes it, or is asked for before the
    first. norm_rope: how queries and keys were normalised and rotated. calls: those outside of compiled code, of which
    alone norm_rope and the number of text tokens are known.
    """

    layer: int
    name: str
    heads: int
    mask: str
    density: float | None
    grid: str | None
    impl: str
    norm_rope: str
    calls: int


class HostReport(Report):
    """The accelerated layers of a transformer; prints as a table, with the reasons for each implementation below.

    reasons: one text of ``stattn.explain`` per kind of call. verified: a line per grid that ``verify`` compared.
    compiled: whether layers ran in compiled code alone, which counts no calls. undone: whether the model runs its own
    attention again, and the rows say what was.
    """

    reasons: tuple[str, ...] = ()
    verified: tuple[str, ...] = ()
    compiled = False
    undone = False

    def __str__(self) -> str:
        notes = [
            *(["without calls: layers that ran in compiled code, which counts none"] if self.compiled else []),
            *(["undone: the transformer runs its own attention"] if self.undone else []),
        ]
        return "\n\n".join([super().__str__(), *self.reasons, *self.verified, *notes])


@dataclass(frozen=True)
class _Call:
    q_shape: tuple[int, ...]
    key_heads: int
    dtype: torch.dtype
    device: str
    grid: Grid
    mask: Masks
    region: Region | None = None
    valid: bool = False
    grad: bool = False


class Layer:
    """One self-attention module: its place in the transformer, its masks and the processor that serves it."""

    def __init__(
        self, host: Host, index: int, name: str, module: Any, heads: int, width: int, mask: Masks, dense: Mask
    ):
        self.host, self.index, self.name, self.module = host, index, name, module
        self.heads, self.head_dim = heads, width // heads
        self.mask, self.dense = mask, dense
        self.processor: Any = None
        self.calls = 0
        self.norm_rope = "-"
        self.last: _Call | None = None

    def last_call(self) -> _Call | None:
        """Give the last call, or what one in compiled code must have been, but for text; None before the first."""
        if self.last is not None or self.host.grid is None:
            return self.last
        grid, weight = Grid(*self.host.grid), next(self.module.parameters())
        shape = (1, grid.tokens, self.heads, self.head_dim)
        return _Call(shape, self.heads, weight.dtype, weight.device.type, grid, self.mask)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        before: int = 0,
        after: int = 0,
        valid: Tensor | None = None,
        parallel: Any = None,
    ) -> Tensor:
        """Attend under the layer's mask. q, k, v: [B, N, heads, D]; before, after: text tokens around the video.

        valid: booleans [B, before + after]. parallel: the host's configuration of context parallelism, under which N is
        this process's share. Returns [B, N, heads, D].
        """
        host = self.host
        if host.grid is None:
            raise RuntimeError(f"{self.name} was called outside of its transformer, which knows the grid of its tokens")
        if q.dtype != v.dtype:  # norms give fp32 under autocast
            q, k = q.to(v.dtype), k.to(v.dtype)
        eager = not torch.compiler.is_compiling()
        if eager and _scores_are_skipped() and q.shape[1] == v.shape[1]:
            return v
        mask: Masks = self.dense if host.dense_now else self.mask
        exchange = None if parallel is None else host.exchange(parallel)
        if exchange is not None:
            if before or after:
                raise ValueError(
                    f"{self.name}: context parallelism would cut the text out of its place; use one process"
                )
            mask = exchange.share(mask, self.heads)
            q, k, v = exchange.queries(q), exchange.keys(k), exchange.keys(v)
        grid = host.grid_of_tokens(k.shape[1], before, after)
        regions = () if exchange is None else exchange.regions(grid)
        if eager:
            self.calls += 1
            grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
            region = max(regions, key=lambda each: each.video, default=None)
            shape = (q.shape[0], q.shape[1] if region is None else region.video, *q.shape[2:])
            self.last = _Call(shape, k.shape[2], q.dtype, q.device.type, grid, mask, region, valid is not None, grad)

        def attend(mask: Masks) -> Tensor:
            return _attend(q, k, v, grid, mask, regions, valid, impl_for(host.impl, "attention"))

        if host.verify:
            host.check(self, q, k, v, grid, mask, valid, attend)
        out = attend(mask)
        return out if exchange is None else exchange.gather(out)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    mask: Masks,
    regions: Sequence[Region],
    valid: Tensor | None,
    impl: str,
) -> Tensor:
    """Attend from the whole grid, or from the regions that q holds one behind the other, to all of k and v."""
    if not regions:
        return attention(q, k, v, grid, mask, valid=valid, impl=impl)
    parts = q.split([each.video for each in regions], dim=1)
    return torch.cat(
        [attention(x, k, v, grid, mask, q_region=each, impl=impl) for x, each in zip(parts, regions, strict=True)],
        dim=1,
    )


class Host:
    """An accelerated transformer: its layers, the grid of the forward pass under way, and the step of its sampling.

    grid_of: gives (t, h, w) from the arguments of a forward pass by name, and refuses what is not served. extra: the
    side of the video on which tokens beyond the grid lie, or None where there may be none.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        grid_of: Callable[[nn.Module, Mapping[str, Any]], Triple],
        extra: str | None,
        impl: Impl,
        dense_steps: int,
        verify: bool,
        adopt: Callable[[Any, Layer], Any],
        exchange: Callable[[Any], Any],
    ):
        self.model, self.names, self.grid_of, self.extra, self.impl = model, names, grid_of, extra, impl
        self.dense_steps, self.verify, self.adopt, self.exchange = dense_steps, verify, adopt, exchange
        # Frames of a causal block of SkyReels-V2, whose mask is then part of the layers'; 1 where there is none.
        self.chunk = chunk_of(model)
        self.layers: list[Layer] = []
        self.grid: Triple | None = None
        self.dense_now = dense_steps > 0
        self.step, self.time = -1, float("inf")
        self.compared: dict[tuple[int, ...], str] = {}
        self._rope: tuple[weakref.ref[Tensor], Any, RopeTables] | None = None

    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Learn the grid and the step from the arguments of the transformer. A forward pre-hook."""
        call = {**dict(zip(self.names, args, strict=False)), **kwargs}
        self.grid = self.grid_of(module, call)
        if chunk_of(module) != self.chunk:
            raise RuntimeError(
                f"num_frame_per_block={chunk_of(module)} was {self.chunk} when the model was accelerated; undo, and "
                "accelerate it again"
            )
        if self.dense_steps:
            self.count(call["timestep"])
        for layer in self.layers:
            if layer.module.processor is not layer.processor:
                layer.processor = self.adopt(layer.module.processor, layer)
                layer.module.processor = layer.processor

    def count(self, timestep: Tensor) -> None:
        """Count a step wherever the largest timestep changes; it grows when another video begins."""
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "dense_steps reads the timestep, which a compiled transformer cannot: compile its blocks instead "
                "(transformer.compile_repeated_blocks())"
            )
        now = float(timestep.max())
        if now != self.time:
            self.step = 0 if now > self.time or self.step < 0 else self.step + 1
            self.time = now
        self.dense_now = self.step < self.dense_steps

    def grid_of_tokens(self, tokens: int, before: int, after: int) -> Grid:
        """Give the grid with its global tokens. Raises ValueError when the tokens are not those of the forward pass."""
        assert self.grid is not None
        t, h, w = self.grid
        more = tokens - t * h * w - before - after
        if more and (more < 0 or self.extra is None):
            raise ValueError(
                f"{type(self.model).__name__} has {tokens} tokens in its self-attention, expected {t}*{h}*{w} of video "
                f"and {before + after} of text"
            )
        if more:
            before, after = (before + more, after) if self.extra == "before" else (before, after + more)
        return Grid(t, h, w, before, after)

    def tables(
        self, source: Tensor, cos: Tensor, sin: Tensor, split: Triple | None, before: int, after: int
    ) -> RopeTables:
        """Give the angle tables of the axes from the angles of all tokens; those of one axis of tokens without a split.

        cos, sin: [tokens, D/2], views of ``source``, by which the tables are remembered: all layers are given the same.
        """
        assert self.grid is not None
        eager = not torch.compiler.is_compiling()
        key = (self.grid, split, before, after, cos.device, torch.is_inference_mode_enabled()) if eager else None
        if eager and self._rope is not None and self._rope[0]() is source and self._rope[1] == key:
            return self._rope[2]
        shape, widths = ((cos.shape[0], 1, 1), (2 * cos.shape[1], 0, 0)) if split is None else (self.grid, split)
        places = [each.reshape(*shape, -1) for each in (cos, sin)]
        ends = (widths[0] // 2, (widths[0] + widths[1]) // 2, sum(widths) // 2)
        t, h, w = (
            torch.stack([(each[:, 0, 0], each[0, :, 0], each[0, 0])[axis][:, start:end] for each in places]).float()
            for axis, (start, end) in enumerate(zip((0, *ends), ends, strict=False))
        )
        found = RopeTables(t, h, w, before, after)
        if eager:
            self._rope = (weakref.ref(source), key, found)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rope": None}

    def check(
        self,
        layer: Layer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: Grid,
        mask: Masks,
        valid: Tensor | None,
        attend: Callable[[Masks], Tensor],
    ) -> None:
        """Compare dense attention with PyTorch's, once per grid, and note how far the mask takes the output from it.

        attend: gives the layer's own attention under a mask.
        Raises RuntimeError where they differ by more than rounding explains.
        """
        place = (*grid.shape, grid.before, grid.after)
        if place in self.compared:
            return
        if torch.compiler.is_compiling():
            raise RuntimeError("verify compares outside of compiled code: run one forward pass before compiling")
        with torch.no_grad():
            seen = None
            if valid is not None:
                seen = torch.ones(q.shape[0], 1, 1, grid.tokens, dtype=torch.bool, device=q.device)
                seen[..., : grid.before] = valid[:, None, None, : grid.before]
                seen[..., grid.before + grid.video :] = valid[:, None, None, grid.before :]
            qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
            want = F.scaled_dot_product_attention(qt, kt, vt, attn_mask=seen).transpose(1, 2)
            dense, ours = (attend(each) for each in (masks.full(), mask))
            video = slice(grid.before, grid.before + grid.video)
            size = want[:, video].abs().max()
            error, moved = (float((x[:, video] - want[:, video]).abs().max() / size) for x in (dense, ours))
        most = {torch.float32: 1e-4, torch.float64: 1e-10}.get(q.dtype, 16 * torch.finfo(q.dtype).eps)
        if not error <= most:
            raise RuntimeError(
                f"{layer.name}: dense attention differs from PyTorch's by {error:.1e} of its largest value"
            )
        self.compared[place] = (
            f"{layer.name} on {grid}: dense differs from PyTorch by {error:.1e} of the largest value, "
            f"{describe_mask(mask)} by {moved:.1e}"
        )

    def report(self) -> HostReport:
        """List the layers and what served them."""
        rows, reasons = [], dict[str, None]()
        for layer in self.layers:
            call, impl = layer.last_call(), impl_for(self.impl, "attention")
            if call is not None:
                text = _explain(call)
                reasons[text] = None
                impl = text.splitlines()[0].rpartition(" ")[2] if impl == "auto" else impl
            share = None if call is None else density(layer.mask, call.grid)
            grid = None if call is None else "x".join(map(str, call.grid.shape))
            if call is not None and call.grid.globals:
                grid = f"{grid} +{call.grid.globals}"
            rows.append(
                HostLayerReport(
                    layer.index,
                    layer.name,
                    layer.heads,
                    describe_mask(layer.mask),
                    share,
                    grid,
                    impl,
                    layer.norm_rope,
                    layer.calls,
                )
            )
        report = HostReport(rows)
        report.reasons, report.verified = tuple(reasons), tuple(self.compared.values())
        report.compiled = self.grid is not None and any(layer.last is None for layer in self.layers)
        return report


def _explain(call: _Call) -> str:
    """Say why the implementation of a call was taken."""
    q = torch.empty(call.q_shape, dtype=call.dtype, device="meta")
    k_shape = (call.q_shape[0], call.grid.tokens, call.key_heads, call.q_shape[3])
    k = torch.empty(k_shape, dtype=call.dtype, device="meta")
    shape = (call.q_shape[0], call.grid.globals)
    valid = torch.ones(shape, dtype=torch.bool, device="meta") if call.valid else None
    with torch.set_grad_enabled(call.grad):
        return explain(
            q.requires_grad_(call.grad),
            k,
            k,
            call.grid,
            call.mask,
            q_region=call.region,
            valid=valid,
            device=call.device,
        )


def _scores_are_skipped() -> bool:
    """Say whether perturbed-attention guidance wants the values in place of the attention.

    The guider's mode watches PyTorch's own attention, which is not called here.
    """
    if not torch._C._len_torch_function_stack():
        return False
    stack = torch.overrides._get_current_function_mode_stack()
    return any(type(mode).__name__ == "AttentionScoreSkipFunctionMode" for mode in stack)


def chunk_of(model: Any) -> int:
    """Give the frames of a block that a model's own causal mask is made of; 1 where it has none."""
    return model.config.get("num_frame_per_block", 1)


class HostAcceleration:
    """What `accelerate` changed on a transformer: a handle that undoes it, as a context manager on leaving."""

    def __init__(self, host: Host):
        self._host = host
        for layer in host.layers:
            layer.processor = host.adopt(layer.module.processor, layer)
            layer.module.processor = layer.processor
        self._hook: Any = host.model.register_forward_pre_hook(host.before_forward, with_kwargs=True)

    def undo(self) -> None:
        """Put every processor back. A second call changes nothing."""
        if self._hook is None:
            return
        self._hook.remove()
        self._hook = None
        for layer in self._host.layers:
            # A processor that was set later, and not run since, stays: it is the model's own wish.
            if layer.module.processor is layer.processor:
                layer.module.processor = layer.processor.base

    def report(self) -> HostReport:
        """List the accelerated layers: masks, densities on the grid seen, implementations taken and why, calls."""
        report = self._host.report()
        report.undone = self._hook is None
        return report

    def __repr__(self) -> str:
        what = ", ".join(dict.fromkeys(describe_mask(each.mask) for each in self._host.layers))
        undone = ", undone" if self._hook is None else ""
        return f"<accelerated {type(self._host.model).__name__}: {len(self._host.layers)} layers, {what}{undone}>"

    def __enter__(self) -> HostAcceleration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()
