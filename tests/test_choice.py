"""What all operations say alike of a device: which of their kernels run on it, and why others do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stattn.ops import _dispatch
from stattn.ops._attention_choice import OPERATION as ATTENTION
from stattn.ops._attention_choice import AttentionCall
from stattn.ops._dispatch import Operation, capability_of
from stattn.ops.denoise import DENOISE_STEP, PHILOX_NORMAL, DenoiseCall, NormalCall
from stattn.ops.gate import GATE_RESIDUAL, GATE_RESIDUAL_MODULATE, GateCall
from stattn.ops.modulate import MODULATE, ModulateCall
from stattn.ops.modulate_linear import MODULATE_LINEAR, ModulateLinearCall
from stattn.ops.patchify import PATCHIFY, UNPATCHIFY, PatchifyCall
from stattn.ops.qk_norm_rope import QK_NORM_ROPE, QK_NORM_ROPE_IN_PLACE, QKNormRopeCall
from stattn.ops.qk_norm_rope_means import QK_NORM_ROPE_MEANS
from stattn.ops.select import OPERATION as SELECT
from stattn.ops.select import SelectCall

HALF = torch.bfloat16
GPU: tuple[str, tuple[int, int]] = ("cuda", (8, 0))
ROPE = QKNormRopeCall(*GPU, HALF, 12, 128, True, True, (HALF, HALF))
CALLS: list[tuple[Operation, Any]] = [
    (ATTENTION, AttentionCall(*GPU, HALF, 128, 4, 2, "mask spatial()", False, "none", False)),
    (SELECT, SelectCall(*GPU, HALF, 128)),
    (PATCHIFY, PatchifyCall(*GPU, HALF, 16, (1, 2, 2))),
    (UNPATCHIFY, PatchifyCall(*GPU, HALF, 16, (1, 2, 2))),
    (MODULATE, ModulateCall(*GPU, (HALF, HALF), 1536, "layer")),
    (MODULATE_LINEAR, ModulateLinearCall(*GPU, (HALF, HALF), 64, False, False)),
    (GATE_RESIDUAL, GateCall(*GPU, (HALF, HALF), 1536, None)),
    (GATE_RESIDUAL_MODULATE, GateCall(*GPU, (HALF, HALF), 1536, "layer")),
    (QK_NORM_ROPE, ROPE),
    (QK_NORM_ROPE_IN_PLACE, ROPE),
    (QK_NORM_ROPE_MEANS, ROPE),
    (DENOISE_STEP, DenoiseCall(*GPU, torch.float32, HALF, (1, 2, 2), False, ())),
    (PHILOX_NORMAL, NormalCall(*GPU)),
]


@pytest.mark.parametrize("operation, call", CALLS, ids=[operation.name for operation, _ in CALLS])
def test_triton_refuses_a_gpu_before_sm_80_by_name(operation: Operation, call: Any) -> None:
    assert operation.choose("auto", call).name == "triton"
    reason = "needs compute capability 8.0, this device has 7.5"
    old = call._replace(capability=(7, 5))
    assert dict(operation.table(old))["triton"] == reason
    with pytest.raises(ValueError, match=f"impl='triton' does not serve {operation.name} for this call: {reason}"):
        operation.choose("triton", old)
    with pytest.raises(ValueError, match=f"nothing serves {operation.name} for this call .*triton: {reason}"):
        operation.choose("auto", old)
    assert dict(operation.table(call._replace(capability=(0, 0))))["triton"] == "torch finds no CUDA device"


@pytest.mark.interpreter
def test_more_tokens_than_kernels_can_number_are_refused_before_anything_runs() -> None:
    """Their numbers would wrap around. Expanded tensors hold one element."""
    from stattn.kernels import _rows, patchify_bwd, qk_norm_rope

    most = "has 2147483648 tokens in its batch; the Triton kernels number at most"
    rows = torch.zeros(1, 1, 1).expand(2**16, 2**15, 1)
    assert _rows.group_rows(rows[:-1]).rows == (2**16 - 1) * 2**15
    with pytest.raises(ValueError, match=f"x {most}"):
        _rows.group_rows(rows)
    heads, few = rows[..., None].expand(-1, -1, 1, 2), torch.zeros(2**16, 1, 1, 2)
    for name, q, k in (("q", heads, few), ("k", few, heads)):
        with pytest.raises(ValueError, match=f"{name} {most}"):
            qk_norm_rope.forward(q, k, q, k, None, None, None, None, False, 1e-6, True)
    video = torch.zeros(1, 1, 1, 1, 1).expand(2**16, 1, 2**5, 2**5, 2**5)
    with pytest.raises(ValueError, match=f"x {most}"):
        patchify_bwd.dweight(rows, video, (1, 1, 1), None)


def test_a_device_is_asked_for_its_capability_once_and_in_a_graph_when_it_is_traced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    class Card:
        major, minor = 8, 6

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: asked.append(device) or Card)
    _dispatch._known_capability.cache_clear()
    try:
        assert [capability_of(torch.device("cuda", 3)) for _ in range(2)] == [(8, 6), (8, 6)]
        assert asked == [torch.device("cuda", 3)]
        assert capability_of(torch.device("cpu")) == (0, 0)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert capability_of(torch.device("cuda", 3)) == (8, 6)
        assert len(asked) == 2
    finally:
        _dispatch._known_capability.cache_clear()
