"""The measured tables of the video system, for ``benchmarks.pages``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.result_tables import Run, record, table

CAPTIONS = "benchmarks/results/h200/tiny_evaluation.json"
CHECKS = {
    "colour": "colour of the main object as asked",
    "shape": "its shape",
    "direction": "the direction in which it sets out",
}


def percent(found: dict[str, float], *names: str, digits: int = 0) -> str:
    return ", ".join(f"{found[name]:.{digits}%}".replace("%", " %") for name in names)


def flicker(found: dict[str, float]) -> str:
    return f"{found['flicker_ratio']:.2f}"


def shipped() -> str:
    captions = record("benchmarks/results/h200/tiny_evaluation.json")["evaluation"]
    camera = record("stattn/weights/camera.json")["evaluation"]
    memory = record("benchmarks/results/h200/memory_evaluation.json")["evaluation"]
    attention = record("benchmarks/results/h200/video_consistency.json")["kinds"]
    run, sample = Run("h200/video_sampler"), "video_sampler/8/captions/stattn"
    drawn, seen = captions["masks"]["full()"], ("colour", "shape", "direction")

    def moves(found: dict[str, float]) -> str:
        return f"{found['pan_r2']:.2f}, {found['zoom_r2']:.2f}"

    flickers = [f"{attention[kind]['flicker_ratio']['mean']:.1f}" for kind in ("full", "per frame")]
    rows = [
        [
            f"{captions['clips']} captions: colour, shape and direction of the main object",
            percent(drawn, *seen),
            f"{percent(captions['real'], *seen)}; {percent(captions['shuffled'], *seen)}",
        ],
        ["flicker, relative to real clips", f"{drawn['flicker_ratio']:.2f}", "1"],
        [
            "camera: R² of recovered and requested pan, zoom",
            moves(camera["generated"]),
            f"{moves(camera['real'])}; {moves(camera['shuffled'])}",
        ],
        [
            f"memory, {memory['clips']} clips: an object that returns has its old colour; without memory tokens",
            f"{percent(memory['with'], 'colour')}; {percent(memory['without'], 'colour')}",
            f"{percent(memory['real'], 'colour')}; {percent(memory['shuffled'], 'colour')}",
        ],
        [
            "30 steps in a CUDA graph, 8 clips; with PyTorch's fastest attention",
            f"{run(sample)}, {run.base(sample)}",
            "",
        ],
        ["flicker of small models, relative to real clips: full, frame-by-frame attention", ", ".join(flickers), "1"],
    ]
    return table(["checks of the video system, fixed seeds, Hopper", "result", "real clips; unrelated clips"], rows)


def checked(head: str, columns: dict[str, dict[str, float]], *sources: str) -> str:
    """Lay out the checks of captions, a column for each set of clips; below, the records and their commands."""
    rows = [[words, *(percent(found, name, digits=1) for found in columns.values())] for name, words in CHECKS.items()]
    rows.append(["flicker, relative to real clips", *(flicker(found) for found in columns.values())])
    text = table([head, *columns], rows)
    for path in sources:
        found = record(path)
        text += f"\n[{path.split('/results/')[1]}](../{path}), {found['machine']}: `{found['command']}`\n"
    return text


def captions() -> str:
    found = record(CAPTIONS)["evaluation"]
    masks = {f"`{mask}`": clips for mask, clips in found["masks"].items()}
    others = {"real clips": found["real"], "real clips of other captions, frames shuffled": found["shuffled"]}
    head = f"{found['clips']} captions, 30 steps, guidance {found['guidance']}"
    return checked(head, masks | others, CAPTIONS)


def trained() -> str:
    columns, sources = {}, []
    for name, words in (("tiny", "`tiny`, patches of 2 x 8 x 8"), ("cubes", "`cubes`, 4 x 16 x 16")):
        path = f"benchmarks/results/h200/{name}_training.json"
        run: dict[str, Any] = record(path)
        columns[f"{words}: {run['steps']:,} steps, {run['minutes']:.1f} minutes"] = run["evaluation"]["masks"]["full()"]
        sources.append(path)
    evaluation = record(sources[0])["evaluation"]
    columns["real clips of other captions"] = evaluation["shuffled"]
    return checked(f"{evaluation['clips']} captions, guidance {evaluation['guidance']}", columns, *sources)


def graphs() -> str:
    run, batches, rows = Run("h200/video_sampler"), (1, 8, 32), []
    for kind, words in (("captions", "captions of unequal lengths"), ("full", "no padding")):
        names = [f"video_sampler/{batch}/{kind}/stattn" for batch in batches]
        peers = [baseline.name for name in names if (baseline := run.row(name).baseline) is not None]
        rows.append([f"{words}: stattn's attention", *map(run, names)])
        cells = [f"{run.base(name)} ({peer.removeprefix('sdpa-')})" for name, peer in zip(names, peers, strict=True)]
        rows.append(["PyTorch's fastest attention, all else equal", *cells])
    return table(["30 steps in one CUDA graph, bf16", "1 clip", "8 clips", "32 clips"], rows, run)


TABLES: dict[str, Callable[[], str]] = {
    "shipped": shipped,
    "captions": captions,
    "trained": trained,
    "graphs": graphs,
}
