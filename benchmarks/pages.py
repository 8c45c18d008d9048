"""Write the measured numbers of README.md, docs/results.md and docs/video.md from the committed results files.

    python -m benchmarks.pages         # after a results file changed; tests/test_results_pages.py fails until then

In a page, a table stands between the lines ``<!-- measured: NAME -->`` and ``<!-- end -->``. `TABLES` says what is in
it. Only the words are written here: every number comes from a file, and a row that a file lacks is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from benchmarks import video_pages
from benchmarks.result_tables import ROOT, Run, shown, table

PAGES = ("README.md", "docs/results.md", "docs/video.md")
BLOCK = re.compile(r"(<!-- measured: ([\w-]+) -->\n).*?(<!-- end -->\n)", re.DOTALL)


def headline() -> str:
    peers, backward, step = Run("h200/attention"), Run("h200/attention_cuda_bwd"), Run("h200/step")
    hosts, sampler = Run("h200/diffusers"), Run("h200/sampler_beside_diffusers")
    denoise, cpu = Run("h200/denoise"), Run("cpu/attention")
    dense, wan = "dense_bwd/wan-1.3b-480p", "step/wan2.1-1.3b-480p"
    sample = "sampler/wan2.1-1.3b-480p"
    host, blocks = "diffusers/wan2.1-1.3b-480p", "diffusers/hunyuanvideo-1.5-720p-121-frames-2-blocks"
    rows = [
        [
            "attention, dense, 32,760 tokens (Wan-1.3B, 480p)",
            peers("attention/cuda/dense_fwd/wan-1.3b-480p"),
            f"cuDNN {peers('attention/torch-cudnn/dense_fwd/wan-1.3b-480p')}",
        ],
        [
            "its backward; the bitwise reproducible one",
            f"{backward(f'attention/cuda/{dense}')}; "
            f"{backward('attention/cuda/dense_bwd_deterministic/wan-1.3b-480p')}",
            f"cuDNN {backward(f'attention/torch-cudnn/{dense}')}",
        ],
        [
            "sliding tile, 115,200 tokens (720p)",
            peers("attention/cuda/sta333/30x48x80"),
            f"compiled FlexAttention {peers('attention/flex/sta333/30x48x80')}, "
            f"{peers('attention/flex/sta333_permutes/30x48x80')} of it to reorder tokens",
        ],
        [
            "window (7, 17, 17), 75,600 tokens (Wan-14B, 720p)",
            peers("attention/cuda/window_7_17_17/wan-14b-720p"),
            f"compiled FlexAttention {peers('attention/flex/window_7_17_17/wan-14b-720p')}",
        ],
        [
            "a denoising step, Wan-1.3B, 480p: dense; sliding tile, 10 %; exact window, 10 %",
            "; ".join(step(f"{wan}/stattn-{kind}") for kind in ("dense", "sliding_tile", "window")),
            f"diffusers, compiled, cuDNN {step(f'{wan}/diffusers')}",
        ],
        [
            "diffusers' own Wan-1.3B after `stattn.accelerate`: dense; sliding tile, 10 %",
            f"{hosts(f'{host}/stattn-full')}; {hosts(f'{host}/stattn-sliding_tile')}",
            f"unmodified, compiled, cuDNN {hosts(f'{host}/cudnn')}",
        ],
        [
            "diffusers' HunyuanVideo-1.5, 121 frames at 720p, two of its blocks: dense",
            f"{hosts(f'{blocks}/stattn-full')}, {hosts(f'{blocks}/stattn-full/memory')}",
            f"unmodified {hosts(f'{blocks}/original')}, {hosts(f'{blocks}/original/memory')}",
        ],
        [
            "50 steps of Wan-1.3B as one CUDA graph: dense; sliding tile, 10 %",
            f"{sampler(f'{sample}/stattn-dense')}; {sampler(f'{sample}/stattn-sliding_tile')}",
            f"diffusers, compiled, cuDNN {sampler(f'{sample}/diffusers')}",
        ],
        [
            "guidance and one UniPC update of 720p latents",
            denoise("ops/denoise_step/fwd/unipc-cfg"),
            f"PyTorch, compiled {denoise('ops/denoise_step-compiled/fwd/unipc-cfg')}",
        ],
        [
            "on a CPU, fp32, two heads of Wan-1.3B: sliding tile, 11 %",
            shown(cpu.row("attention/reference/sliding_tile_122_fwd/wan-1.3b-480p-2-heads").value / 1e3, "s"),
            f"PyTorch, dense {shown(cpu.row('attention/sdpa/dense_fwd/wan-1.3b-480p-2-heads').value / 1e3, 's')}",
        ],
    ]
    return table(["H200, bf16, medians; random weights", "stattn", "baseline, same run"], rows)


def dense(card: str = "h200") -> str:
    run, backward = Run(f"{card}/attention_cuda"), Run(f"{card}/attention_cuda_bwd")
    shapes = {
        "wan-1.3b-480p": "Wan-1.3B, 480p: 32,760 tokens, 12 heads of 128",
        "cogvideox-5b": "CogVideoX-5B: 17,550 tokens, 48 heads of 64",
        "hunyuan-720p": "HunyuanVideo, 720p: 118,800 tokens, 24 heads of 128",
    }
    rows = []
    for shape, words in shapes.items():
        name = f"dense_fwd/{shape}"
        rows.append([f"{words}, forward", run(f"attention/cuda/{name}"), run(f"attention/torch-cudnn/{name}")])
        name = f"dense_bwd/{shape}"
        if f"attention/cuda/{name}" in backward.rows:
            cudnn = backward(f"attention/torch-cudnn/{name}")
            rows.append(["its backward", backward(f"attention/cuda/{name}"), cudnn])
            fixed = f"attention/cuda/dense_bwd_deterministic/{shape}"
            rows.append(["the same, bitwise reproducible", backward(fixed), cudnn])
    return table(["dense", "`cuda`", "cuDNN through PyTorch"], rows, run, backward)


MASKED = {
    "sta333/30x48x80": "sliding tile (6, 8, 8), window (3, 3, 3), 30 x 48 x 80, 24 heads",
    "blocks64_sta/30x48x80": "the same pairs as block lists of 64 tokens",
    "blocks64_random162/115200": "162 of 1,800 random key tiles of 64 tokens, 30 x 48 x 80, 24 heads",
    "frame_causal_3/wan-1.3b-480p": "`frame_causal(3)`, 21 x 30 x 52, 12 heads",
    "frame_causal_query/self-forcing": "the same, only the last 3 frames as queries",
    "spatial/wan-14b-720p": "per-frame (`spatial`), 21 x 45 x 80, 40 heads",
    "window_18_24_24/30x48x80": "window (18, 24, 24), 30 x 48 x 80, 24 heads",
    "window_7_17_17/wan-14b-720p": "window (7, 17, 17), 21 x 45 x 80, 40 heads",
    "window_7_15_15/hunyuan-720p": "window (7, 15, 15), 33 x 45 x 80, 24 heads",
    "joint_256/hunyuan-720p": "window (7, 15, 15) and 256 tokens of text, 33 x 45 x 80, 24 heads",
}


def masked(card: str = "h200") -> str:
    run = Run(f"{card}/attention_cuda")
    rows = [
        [words, run(f"attention/cuda/{name}"), run.base(f"attention/cuda/{name}")] for name, words in MASKED.items()
    ]
    copied = "attention/cuda/temporal/wan-14b-720p"
    rows.append(["per-place (`temporal`), 21 x 45 x 80, 40 heads", run(copied), f"`copy_` {run.base(copied)}"])
    return table(["forward", "`cuda`", "dense `cuda` with as many pairs"], rows, run)


def masked_backward(card: str = "h200") -> str:
    run = Run(f"{card}/attention_cuda_bwd")
    rows = []
    for name, words in MASKED.items():
        mask, shape = name.split("/")
        fast, fixed = f"attention/cuda/{mask}_bwd/{shape}", f"attention/cuda/{mask}_bwd_deterministic/{shape}"
        if fast in run.rows:
            rows.append([words, run(fast), run(fixed), run.base(fast)])
    return table(["backward", "`cuda`", "bitwise reproducible", "forward"], rows, run)


def triton() -> str:
    run = Run("h200/attention")

    def beside(kind: str, **names: str) -> str:
        return "; ".join(f"{words} {run(f'attention/{name}/{kind}')}" for name, words in names.items())

    flex = {"flex": "compiled FlexAttention"}
    wan, hd64 = "wan-1.3b-480p", "cogvideox-5b"
    window, tile = "window_7_17_17/wan-14b-720p", "sta333/30x48x80"
    rows = [
        ["dense, 32,760 tokens, 12 heads of 128", f"dense_fwd/{wan}", flex | {"torch-cudnn": "cuDNN"}],
        ["its backward", f"dense_bwd/{wan}", flex | {"torch-cudnn": "cuDNN"}],
        ["dense, 17,550 tokens, 48 heads of 64", f"dense_fwd/{hd64}", flex | {"torch-cudnn": "cuDNN"}],
        [MASKED[tile], tile, flex],
        [MASKED[window], window, flex],
        [
            "per-place (`temporal`), 21 x 45 x 80, 40 heads",
            "temporal/wan-14b-720p",
            {"torch-sdpa": "PyTorch on copies", "torch-sdpa-views": "on views"},
        ],
        ["per-frame (`spatial`), the same", "spatial/wan-14b-720p", {"torch-sdpa": "PyTorch on views"}],
    ]
    lines = [
        [str(words), run(f"attention/triton/{kind}"), run(f"attention/cuda/{kind}"), beside(str(kind), **dict(names))]
        for words, kind, names in rows
    ]
    return table(["attention", "`triton`", "`cuda`", "others, same run"], lines, run)


def steps() -> str:
    run = Run("h200/step")
    kinds = {
        "diffusers": "diffusers, compiled by blocks, cuDNN's attention",
        "stattn-dense": "stattn, dense",
        "stattn-sliding_tile": "sliding tile",
        "stattn-window": "exact window",
    }
    rows = []
    for shape, words in (
        ("wan2.1-1.3b-480p", "Wan2.1-1.3B, 81 frames at 480p"),
        ("wan2.1-14b-720p-2-layers", "Wan2.1-14B, 81 frames at 720p, two layers"),
    ):
        for kind, label in kinds.items():
            name = f"step/{shape}/{kind}"
            pairs = run.row(f"{name}/density").value
            rows.append([words, label, f"{pairs:.1%}".replace("%", " %"), run(name), run(f"{name}/attention")])
            words = ""
    return table(["one step, without guidance", "", "pairs", "time", "attention alone"], rows, run)


def densities() -> str:
    run = Run("h200/step")
    shape = "step/wan2.1-1.3b-480p-4-layers"
    windows = ("3, 9, 19", "5, 13, 25", "11, 19, 33", "15, 23, 41", "19, 27, 47")
    kinds = {
        "eager": "PyTorch's operations, one by one",
        "compiled": "compiled by blocks, cuDNN's attention",
        "flex": "compiled by blocks, FlexAttention",
        "flex-window": "the same, window (7, 15, 31)",
        "stattn-dense": "stattn, dense",
        "stattn-sliding_tile": "sliding tile",
        "stattn-window": "window (7, 15, 31)",
        **{f"stattn-window({each})": f"window ({each})" for each in windows},
    }
    rows = []
    for kind, words in kinds.items():
        pairs = run.row(f"{shape}/{kind}/density").value
        error = "–" if kind == "eager" else f"{10 ** (-run.row(f'{shape}/{kind}/snr').value / 20):.2g}"
        rows.append([words, f"{pairs:.1%}".replace("%", " %"), run(f"{shape}/{kind}"), error])
    head = ["one step of four layers of Wan2.1-1.3B, random weights", "pairs", "time", "relative error to dense"]
    return table(head, rows, run)


def samples() -> str:
    run = Run("h200/sampler_beside_diffusers")
    shape = "sampler/wan2.1-1.3b-480p"
    rows = []
    for kind, words in (
        ("diffusers", "diffusers, compiled by blocks, cuDNN's attention"),
        ("stattn-dense", "stattn, dense, one CUDA graph"),
        ("stattn-sliding_tile", "stattn, sliding tile, one CUDA graph"),
    ):
        name = f"{shape}/{kind}"
        gap = run(f"{name}/gap") if f"{name}/gap" in run.rows else "–"
        error = "–" if kind == "stattn-dense" else f"{run.row(f'{name}/snr').value:.1f} dB"
        rows.append([words, run(name), run.base(name), gap, error])
    head = ["50 steps of Wan2.1-1.3B, 480p", "time", "50 x one step alone", "longest gap", "SNR to stattn, dense"]
    return table(head, rows, run)


def diffusers(card: str = "h200") -> str:
    run = Run(f"{card}/diffusers")
    rows = []
    for shape, words, original in (
        ("wan2.1-1.3b-480p", "Wan2.1-1.3B, 81 frames at 480p, compiled", "cudnn"),
        ("hunyuanvideo-1.5-720p-61-frames-2-blocks", "HunyuanVideo-1.5, 61 frames at 720p, two blocks", "original"),
        ("hunyuanvideo-1.5-720p-121-frames-2-blocks", "the same, 121 frames", "original"),
    ):
        cells = []
        for kind in (original, "stattn-full", "stattn-sliding_tile"):
            name = f"diffusers/{shape}/{kind}"
            memory = f"{name}/memory"
            cells.append(f"{run(name)}, {run(memory)}" if memory in run.rows else run(name))
        rows.append([words, *cells])
    head = ["diffusers' transformers", "unmodified", "`stattn.accelerate`, dense", "sliding tile, 9 to 10 %"]
    return table(head, rows, run)


def elementwise(card: str = "h200") -> str:
    runs = [Run(f"{card}/{stem}") for stem in ("ops", "qk_norm_rope")]
    shape = "wan-14b-720p"
    rows = []
    for op in ("modulate", "gate_residual", "gate_residual_modulate", "qk_norm_rope"):
        for way, words in (("fwd", f"`{op}`"), ("bwd", "its backward")):
            name = f"ops/{op}/{way}/{shape}"
            run = next(run for run in runs if name in run.rows)
            rivals = [f"ops/{op}-{kind}/{way}/{shape}" for kind in ("compiled", "diffusers")]
            best = min((row for row in rivals if row in run.rows), key=lambda row: run.row(row).value)
            copy = f"ops/{op}-copy/{way}/{shape}"
            rows.append([words, run(name), run(best), run(copy), f"{1 / run.ratio(name, copy):.2f}"])
    head = ["75,600 tokens x 5120", "`triton`", "compiled", "`copy_` of as many bytes", "share of the copy rate"]
    return table(head, rows, *runs)


def solver(card: str = "h200") -> str:
    run = Run(f"{card}/denoise")
    rows = []
    for step, words in (
        ("euler-cfg", "Euler, guidance"),
        ("unipc-cfg", "UniPC, guidance"),
        ("unipc-cfg-blend", "the same and a known region"),
        ("euler-cfg-rescale", "Euler, rescaled guidance"),
        ("euler-cfg-zero_star", "Euler, CFG-Zero*"),
        ("euler-cfg-latents", "Euler, guidance, from latents"),
    ):
        names = [f"ops/denoise_step{kind}/fwd/{step}" for kind in ("", "-compiled", "-eager")]
        rows.append([words, *(run(name) for name in names)])
    return table(["Wan's latents at 720p, from tokens", "`denoise_step`", "compiled", "eager"], rows, run)


def patches() -> str:
    run, rows = Run("h200/patchify"), []
    for shape, words in (
        ("wan-14b-latent", "Wan-14B's latents, 720p"),
        ("wan-1.3b-latent", "Wan-1.3B's latents, 480p"),
        ("pixels_4x16x16_256", "pixels, patches of 4 x 16 x 16"),
    ):
        linear, conv = f"patchify/linear/fwd/{shape}", f"patchify/conv3d/fwd/{shape}"
        rows.append([f"`patchify3d`: {words}", run(f"patchify/fwd/{shape}"), run(linear), run(conv)])
        others = [run(f"patchify/{kind}/bwd/{shape}") for kind in ("linear", "conv3d")]
        rows.append(["its backward", run(f"patchify/bwd/{shape}"), *others])
        permute = f"unpatchify/permute/fwd/{shape}"
        rows.append([f"`unpatchify3d`: {words}", run(f"unpatchify/fwd/{shape}"), f"permute {run(permute)}", ""])
    return table(["", "`triton`", "reshape and linear", "Conv3d"], rows, run)


def select() -> str:
    run = Run("h200/select")
    rows = []
    for name, words in (
        ("top_k/115200_tiles64_keep162", "`top_k`: 162 of 1,800 tiles for each tile and head"),
        ("top_p/115200_tiles64_mass50", "`top_p`: half of the mass"),
        ("join/115200_tiles64_keep162_sliding_tile_333", "`mask \\| blocks`: sliding tile or top-k"),
    ):
        rows.append([words, run(f"select/{name}"), run.base(f"select/{name}")])
    return table(["115,200 tokens, 24 heads, tiles of 64", "`triton`", "`reference`"], rows, run)


def cpu() -> str:
    run = Run("cpu/attention")
    end = "_fwd/wan-1.3b-480p-2-heads"
    rows = [
        [words, f"{1 / run.ratio(f'attention/reference/{name}{end}'):.1f} x"]
        for name, words in (
            ("window_9_15_25", "window (9, 15, 25), 10 % of the pairs"),
            ("window_21_10_16", "window (21, 10, 16), 10 %"),
            ("sliding_tile_122", "sliding tile (7, 10, 13), window (1, 2, 2), 11 %"),
        )
    ]
    head = ["21 x 30 x 52, two heads of 128, fp32", "speed-up of `reference` over PyTorch's dense attention"]
    return table(head, rows, run)


TABLES: dict[str, Callable[[], str]] = {
    **video_pages.TABLES,
    "headline": headline,
    "dense": dense,
    "masked": masked,
    "masked-backward": masked_backward,
    "triton": triton,
    "steps": steps,
    "densities": densities,
    "samples": samples,
    "diffusers": diffusers,
    "elementwise": elementwise,
    "solver": solver,
    "patches": patches,
    "select": select,
    "cpu": cpu,
    "dense-h100": lambda: dense("h100"),
    "masked-h100": lambda: masked("h100"),
    "masked-backward-h100": lambda: masked_backward("h100"),
    "diffusers-h100": lambda: diffusers("h100"),
    "elementwise-h100": lambda: elementwise("h100"),
    "solver-h100": lambda: solver("h100"),
}


def written(text: str) -> str:
    """Fill the tables of a page."""
    return BLOCK.sub(lambda block: f"{block[1]}\n{TABLES[block[2]]()}\n{block[3]}", text)


def main() -> None:
    for page in PAGES:
        path = ROOT / page
        path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"wrote the measured numbers of {page}")


if __name__ == "__main__":
    main()
