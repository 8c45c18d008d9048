"""Selection of key tiles by Triton against the reference and float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from mask_definitions import Triple

import stattn
from stattn import BlockList, Grid
from stattn.blocks import tile_count
from stattn.kernels import select as kernels
from stattn.masks import FULL
from stattn.ops.select import MOST_TILES, OPERATION, SelectCall
from stattn.reference.select import tile_means

ON = [
    pytest.param("cpu", id="interpreter", marks=pytest.mark.interpreter),
    pytest.param("cuda", id="cuda", marks=pytest.mark.gpu),
]


def tokens(grid: Grid, heads: int, key_heads: int, device: str, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Random q and k, drawn on the CPU so that every device sees the same."""
    q, k = (torch.randn(batch, grid.tokens, each, 6).to(device) for each in (heads, key_heads))
    return q, k


def assert_as_reference(blocks: BlockList, expected: BlockList) -> None:
    assert torch.equal(blocks.count.cpu(), expected.count.cpu())
    assert torch.equal(blocks.index.cpu(), expected.index.cpu())


def assert_best(blocks: BlockList, table: torch.Tensor, slack: float) -> None:
    """Lists ascend, and no tile that is left out beats one that is kept by more than the slack."""
    used = torch.arange(blocks.index.shape[-1], device=blocks.index.device) < blocks.count[..., None]
    assert ((blocks.index.diff(dim=-1) > 0) | ~used[..., 1:]).all(), "lists are in ascending order, each tile once"
    chosen = blocks.kinds() == FULL
    assert torch.equal(chosen.sum(-1, dtype=torch.int32), blocks.count)
    least = table.masked_fill(~chosen, math.inf).amin(-1)
    best = table.masked_fill(chosen, -math.inf).amax(-1)
    assert (least >= best - slack).all(), f"a tile is left out that is better by {(best - least).max()} > {slack}"


def assert_mass(blocks: BlockList, table: torch.Tensor, mass: float, slack: float) -> None:
    """The tiles of each row reach the mass, and without the least of them they do not, within the slack."""
    assert_best(blocks, table, slack)
    chosen = blocks.kinds() == FULL
    weights = table.softmax(-1)
    held = (weights * chosen).sum(-1)
    without = held - weights.masked_fill(~chosen, math.inf).amin(-1)
    assert (held >= mass - slack).all()
    assert (without < mass + slack).all()


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize(
    "grid, q_tile, k_tile, heads, key_heads",
    [
        (Grid(3, 5, 7, 2, 3), (3, 5, 4), (2, 2, 3), 4, 2),
        (Grid(4, 6, 8), (4, 3, 8), (2, 3, 4), 3, 1),
        (Grid(1, 1, 9, 0, 4), (1, 1, 4), (1, 1, 2), 1, 1),
    ],
    ids=str,
)
def test_triton_selects_as_the_reference_does(
    device: str, grid: Grid, q_tile: Triple, k_tile: Triple, heads: int, key_heads: int
) -> None:
    q, k = tokens(grid, heads, key_heads, device)
    tiles = tile_count(grid.shape, k_tile)
    arguments = (3 * q, k, grid, q_tile, k_tile)
    for keep in (max(1, tiles // 3), tiles):
        got, expected = (stattn.top_k(*arguments, keep, impl=impl) for impl in ("triton", "reference"))
        assert_as_reference(got, expected)
    for mass in (0.6, 1.0):
        got, expected = (stattn.top_p(*arguments, mass, impl=impl) for impl in ("triton", "reference"))
        assert_as_reference(got, expected)


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("dim", [5, 128])
def test_triton_breaks_the_ties_of_integers_as_the_reference_does(device: str, dim: int) -> None:
    grid = Grid(2, 4, 16)
    q, k = (torch.randint(-1, 2, (1, grid.tokens, 1, dim), device=device) for _ in range(2))
    for keep in (7, 30):
        arguments = (q.half(), k.half(), grid, (1, 4, 8), (1, 2, 1), keep)
        got, expected = (stattn.top_k(*arguments, impl=impl) for impl in ("triton", "reference"))
        assert_as_reference(got, expected)


@pytest.mark.parametrize("device", ON)
def test_triton_lets_the_lower_tile_win_a_tie(device: str) -> None:
    q, k = torch.ones(1, 64, 2, 4, device=device), torch.ones(1, 64, 2, 4, device=device)
    blocks = stattn.top_k(q, k, (1, 8, 8), (1, 4, 4), (1, 2, 2), 5, impl="triton")
    assert (blocks.index.cpu() == torch.arange(5)).all()
    blocks = stattn.top_p(q, k, (1, 8, 8), (1, 4, 4), (1, 2, 2), 0.25, impl="triton")
    assert (blocks.count == 4).all()
    assert (blocks.index[..., :4].cpu() == torch.arange(4)).all()


@pytest.mark.parametrize("device", ON)
def test_triton_takes_what_is_no_number_as_the_reference_does(device: str) -> None:
    q = torch.rand(1, 12, 1, 4, device=device) + 1
    for odd in ((3, math.nan), (5, -math.inf), (7, math.inf)):
        k = torch.randn(1, 12, 1, 4, device=device)
        k[0, odd[0]] = odd[1]
        k[0, 2] = k[0, 8]  # and a tie
        for select, share in ((stattn.top_k, 2), (stattn.top_p, 0.7)):
            got, expected = (
                select(q, k, (1, 1, 12), (1, 1, 6), (1, 1, 1), share, impl=x) for x in ("triton", "reference")
            )
            assert_as_reference(got, expected)


@pytest.mark.parametrize("device", ON)
def test_triton_reads_tokens_as_they_lie(device: str) -> None:
    grid, tiles = Grid(3, 5, 7, 2, 3), ((3, 5, 4), (2, 3, 4))
    packed = torch.randn(1, grid.tokens, 3, 2, 6, device=device)
    q, k, _ = packed.unbind(2)
    for a, b in (
        (q, k),
        (q.transpose(1, 3).contiguous().transpose(1, 3), k.transpose(1, 2).contiguous().transpose(1, 2)),
        (q[..., ::2], k.flip(3)[..., 1::2]),
        (q, k[:, :, :1].expand(-1, -1, 2, -1)),
    ):
        got = stattn.top_k(a, b, grid, *tiles, 3, impl="triton")
        assert_as_reference(got, stattn.top_k(a.contiguous(), b.contiguous(), grid, *tiles, 3, impl="triton"))
        assert_as_reference(got, stattn.top_k(a, b, grid, *tiles, 3, impl="reference"))


@pytest.mark.parametrize("device", ON)
def test_triton_selects_from_rows_of_any_length(device: str) -> None:
    for tiles in (1, 31, 33) if device == "cpu" else (1, 31, 33, 1025, 5000):
        q = torch.ones(1, tiles, 1, 16, device=device)
        k = torch.randint(-3, 4, (1, tiles, 1, 16), device=device).float()
        keep = max(1, tiles // 5)
        arguments = (q, k, (1, 1, tiles), (1, 1, tiles), (1, 1, 1))
        got, expected = (stattn.top_k(*arguments, keep, impl=impl) for impl in ("triton", "reference"))
        assert_as_reference(got, expected)
        blocks = stattn.top_p(*arguments, 0.9, impl="triton")
        assert_mass(blocks, k[0, :, 0].double().sum(-1).expand(1, 1, 1, tiles) / 4, 0.9, 1e-5)


@pytest.mark.parametrize("device", ON)
def test_triton_selects_alike_however_many_scores_it_holds(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = tokens(Grid(3, 5, 7), 2, 1, device, batch=2)
    for select, share in ((stattn.top_k, 3), (stattn.top_p, 0.6)):
        arguments = (q, k, (3, 5, 7), (3, 5, 4), (2, 3, 4), share)
        whole = select(*arguments, impl="triton")
        with monkeypatch.context() as patch:
            patch.setattr("stattn.kernels.select.SCORES", 1)
            assert_as_reference(select(*arguments, impl="triton"), whole)
        assert_as_reference(
            select(q[1:], k[1:], *arguments[2:], impl="triton"),
            BlockList(whole.shape, whole.q_tile, whole.k_tile, whole.count[1:], whole.index[1:]),
        )


@pytest.mark.parametrize("device", ON)
def test_triton_lists_rows_piece_by_piece(device: str) -> None:
    q = torch.ones(1, 60, 1, 16, device=device)
    k = torch.randint(-1, 2, (1, 60, 1, 16), device=device).float()  # with ties in several pieces
    sizes = ((1, 1, 60), (1, 1, 60), (1, 1, 1))
    for keep, mass in ((27, None), (None, 0.6)):
        small = kernels.select(q, k, *sizes, keep, mass, replace(kernels.CONFIGS[0], row_piece=16))
        whole = kernels.select(q, k, *sizes, keep, mass)
        assert all(torch.equal(one, other) for one, other in zip(small, whole, strict=True))
    assert_as_reference(stattn.top_k(q, k, *sizes, 27, impl="triton"), stattn.top_k(q, k, *sizes, 27, impl="reference"))


@pytest.mark.parametrize("device", ON)
def test_triton_writes_all_of_its_lists_and_reads_nothing_unwritten(device: str) -> None:
    q, k = tokens(Grid(3, 5, 7), 2, 1, device)
    for select, share in ((stattn.top_k, 3), (stattn.top_p, 0.6)):
        arguments = (q, k, (3, 5, 7), (3, 5, 4), (2, 3, 4), share)
        expected = select(*arguments, impl="triton")
        torch.use_deterministic_algorithms(True)  # torch.empty then fills with NaN
        try:
            assert_as_reference(select(*arguments, impl="triton"), expected)
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.interpreter
def test_triton_refuses_rows_that_are_too_long_for_it() -> None:
    assert kernels.MOST_TILES == MOST_TILES
    assert dict(OPERATION.table(SelectCall("cuda", (9, 0), torch.bfloat16, 64, MOST_TILES)))["triton"] is None
    x = torch.zeros(1, MOST_TILES + 1, 1, 2)
    with pytest.raises(ValueError, match=f"at most {MOST_TILES} key tiles, not {MOST_TILES + 1}"):
        stattn.top_k(x, x, (1, 1, MOST_TILES + 1), (1, 1, 999), (1, 1, 1), 3, impl="triton")
    with pytest.raises(ValueError, match="float64"):
        stattn.top_k(x.double(), x.double(), (1, 1, MOST_TILES + 1), (1, 1, 999), (1, 1, 999), 3, impl="triton")


@pytest.mark.parametrize(
    "impl, device",
    [
        ("reference", "cpu"),
        pytest.param("triton", "cpu", id="interpreter", marks=pytest.mark.interpreter),
        pytest.param("triton", "cuda", marks=pytest.mark.gpu),
    ],
)
def test_selection_is_an_operator_that_compiles(impl: str, device: str) -> None:
    q, k = tokens(Grid(2, 3, 4), 2, 1, device)
    sizes = ([2, 3, 4], [2, 3, 4], [1, 2, 2])
    for keep, mass in ((3, 0.0), (0, 0.6)):
        torch.library.opcheck(torch.ops.stattn.select.default, (q, k, *sizes, keep, mass, None, impl))

    def select(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        best, most = (
            stattn.top_k(q, k, (2, 3, 4), *sizes[1:], 3, impl=impl),
            stattn.top_p(q, k, (2, 3, 4), *sizes[1:], 0.6, impl=impl),
        )
        return best.count, best.index, most.count, most.index

    compiled = torch.compile(select, fullgraph=True, backend="aot_eager")
    for eager, other in zip(select(q, k), compiled(q, k), strict=True):
        assert torch.equal(eager, other)


# Real sizes.

VIDEO = Grid(30, 48, 80, 0, 256)


def table_of(q: torch.Tensor, k: torch.Tensor, q_tile: Triple, k_tile: Triple) -> tuple[torch.Tensor, float]:
    """Scores in float64, and what fp32 may be off by: 32 roundings of the sums of absolute products."""
    video = [x.double()[:, : VIDEO.video] for x in (q, k)]
    q_means, k_means = (tile_means(x, VIDEO, tile) for x, tile in zip(video, (q_tile, k_tile), strict=True))
    k_means = k_means.repeat_interleave(q.shape[2] // k.shape[2], dim=1).transpose(-1, -2)
    return q_means @ k_means, 32 * torch.finfo(torch.float32).eps * float((q_means.abs() @ k_means.abs()).max())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("k_tile", [(2, 4, 8), (6, 8, 8), (4, 5, 7)], ids=str)
def test_triton_selects_from_a_video(dtype: torch.dtype, k_tile: Triple) -> None:
    packed = torch.randn(1, VIDEO.tokens, 6, 128, device="cuda").to(dtype)
    q, k = 3 * packed[:, :, :4], packed[:, :, 4:]
    table, slack = table_of(q, k, (2, 4, 8), k_tile)
    keep = tile_count(VIDEO.shape, k_tile) // 11
    blocks = stattn.top_k(q, k, VIDEO, (2, 4, 8), k_tile, keep)
    assert (blocks.count == keep).all()
    assert_best(blocks, table, slack)
    assert_mass(stattn.top_p(q, k, VIDEO, (2, 4, 8), k_tile, 0.3), table / math.sqrt(128), 0.3, slack)
    for _ in range(20):
        assert torch.equal(stattn.top_k(q, k, VIDEO, (2, 4, 8), k_tile, keep).index, blocks.index)


@pytest.mark.gpu
def test_every_config_selects_alike() -> None:
    q, k = torch.randn(2, 1, VIDEO.video, 2, 64, device="cuda", dtype=torch.bfloat16)
    for keep, mass in ((100, None), (None, 0.3)):
        table, slack = table_of(q, k, (2, 4, 8), (2, 4, 8))
        for config in kernels.CONFIGS:
            count, index = kernels.select(q, k, VIDEO.shape, (2, 4, 8), (2, 4, 8), keep, mass, config)
            blocks = BlockList(VIDEO.shape, (2, 4, 8), (2, 4, 8), count, index)
            if keep:
                assert_best(blocks, table, slack)
            else:
                assert_mass(blocks, table / math.sqrt(64), 0.3, slack)


@pytest.mark.gpu
def test_the_longest_rows_are_selected_from() -> None:
    x = torch.randn(1, MOST_TILES, 1, 64, device="cuda")
    arguments = (x[:, :].flip(1), x, (1, 128, 128), (1, 8, 8), (1, 1, 1))
    for select, share in ((stattn.top_k, 1000), (stattn.top_p, 0.5)):
        got, expected = (select(*arguments, share, impl=impl) for impl in ("triton", "reference"))
        same = (got.kinds() == expected.kinds()).float().mean()
        assert same > 1 - 1e-5, f"{1 - same} of the tiles differ: more than ties within rounding"


@pytest.mark.gpu
def test_selection_replays_as_a_graph_on_any_stream() -> None:
    q, k = torch.randn(2, 2, VIDEO.video, 2, 128, device="cuda", dtype=torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            stattn.top_k(q, k, VIDEO, (2, 4, 8), (2, 4, 8), 162)
            stattn.top_p(q, k, VIDEO, (2, 4, 8), (2, 4, 8), 0.3)
        torch.cuda.current_stream().wait_stream(side)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        best = stattn.top_k(q, k, VIDEO, (2, 4, 8), (2, 4, 8), 162)
        most = stattn.top_p(q, k, VIDEO, (2, 4, 8), (2, 4, 8), 0.3)
    for _ in range(20):
        q.normal_()
        k.normal_()
        graph.replay()
        assert torch.equal(best.index, stattn.top_k(q, k, VIDEO, (2, 4, 8), (2, 4, 8), 162).index)
        assert torch.equal(most.count, stattn.top_p(q, k, VIDEO, (2, 4, 8), (2, 4, 8), 0.3).count)


@pytest.mark.gpu
def test_offsets_over_two_billion_elements_are_read() -> None:
    packed = torch.empty(3, VIDEO.video, 3, 24, 128, device="cuda", dtype=torch.bfloat16)
    packed[2].normal_()
    assert packed.stride(0) * 2 + packed[0].numel() > 2**31
    q, k, _ = packed.unbind(2)
    blocks = stattn.top_k(q, k, VIDEO, (2, 4, 8), (6, 8, 8), 10)
    alone = stattn.top_k(q[2:].clone(), k[2:].clone(), VIDEO, (2, 4, 8), (6, 8, 8), 10)
    assert torch.equal(blocks.index[2:], alone.index)


@pytest.mark.gpu
def test_selection_holds_little_beside_its_lists() -> None:
    q, k = torch.randn(2, 1, VIDEO.video, 24, 128, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    blocks = stattn.top_k(q, k, VIDEO, (2, 4, 8), (2, 4, 8), 162)
    lists = blocks.index.nbytes + blocks.count.nbytes
    assert torch.cuda.max_memory_allocated() - before < lists + (128 << 20)  # 44 MB of means, 64 MB of scores


@pytest.mark.gpu
def test_selection_runs_on_the_tensors_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    q, k = tokens(Grid(3, 5, 7), 2, 1, "cuda:0")
    expected = stattn.top_k(q, k, (3, 5, 7), (2, 2, 4), (2, 3, 4), 3)
    blocks = stattn.top_k(q.to("cuda:1"), k.to("cuda:1"), (3, 5, 7), (2, 2, 4), (2, 3, 4), 3)
    assert blocks.index.device == torch.device("cuda:1")
    assert_as_reference(blocks, expected)


@pytest.mark.gpu
def test_selection_makes_more_sets_than_a_grid_has_rows() -> None:
    x = torch.randn(1000, 4, 80, 8, device="cuda", dtype=torch.bfloat16)
    blocks = stattn.top_k(x, x, (4, 1, 1), (2, 1, 1), (1, 1, 1), 2)  # 80,000 batches x heads
    alone = stattn.top_k(x[777:778], x[777:778], (4, 1, 1), (2, 1, 1), (1, 1, 1), 2)
    assert torch.equal(blocks.index[777:778], alone.index)
