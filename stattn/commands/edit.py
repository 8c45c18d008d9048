"""`stattn edit`: edits of video files."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from stattn import dit
from stattn.dit import DiT
from stattn.masks import parse
from stattn.video import edit, files, objects
from stattn.video.paint import Sampling
from stattn.world import COLOURS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the edits and their options."""
    edits = parser.add_subparsers(dest="edit", required=True, metavar="edit")

    def add(name: str, purpose: str, apply: Callable[..., edit.Edit]) -> argparse.ArgumentParser:
        child = edits.add_parser(name, help=purpose, description=purpose[0].upper() + purpose[1:] + ".")
        child.set_defaults(apply=apply)
        child.add_argument("video", metavar="IN", help="a video file")
        child.add_argument("out", metavar="OUT.mp4", help="the result; a lossless file is written beside it")
        return child

    child = add("inpaint", "generate anew what a mask covers", _inpaint)
    _add_region(child, required=True)
    child = add("outpaint", "extend the picture", _outpaint)
    child.add_argument(
        "--margins", type=_numbers(4), required=True, metavar="L,R,T,B", help="pixels at left, right, top, bottom"
    )
    child = add("recolour", "give one object another colour in all frames", _recolour)
    child.add_argument("--source", choices=COLOURS, required=True, help="the object's colour")
    child.add_argument("--target", choices=COLOURS, required=True, help="its new one")
    _add_region(child, required=False)
    _add_strength(child, 0.4)
    child = add("restyle", "generate a video anew from its own coarse structure", _restyle)
    _add_region(child, required=False)
    _add_strength(child, 0.5)
    child = add("motion-brush", "move one object along a path and leave the rest where it is", _motion_brush)
    _add_region(child, required=False)
    child.add_argument("--colour", choices=COLOURS, help="brush the object of this colour")
    child.add_argument(
        "--path",
        required=True,
        type=_points,
        metavar="X,Y[;X,Y...]",
        help="offsets in pixels from where the object is: the last one, reached in a line, or one for each frame",
    )
    _add_strength(child, 0.5)
    for child in edits.choices.values():
        _add_sampling(child)


def main(args: argparse.Namespace) -> int:
    """Read, edit, write, and say what it cost."""
    files.out_path(args.out)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    video, fps = files.read_clip(args.video, max_frames=args.max_frames)
    mask = _region(args, video)
    model = dit.load(args.model, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, device=device)
    sampling = Sampling(
        steps=args.steps,
        guidance=args.guidance,
        shift=args.shift,
        seed=args.seed,
        mask=None if args.mask_attention is None else parse(args.mask_attention),
        refresh=args.refresh,
        size=args.size,
        overlap=args.overlap,
    )
    began = time.perf_counter()
    result = args.apply(args, model, video, mask, sampling)
    seconds = time.perf_counter() - began
    for path in files.write_result(args.out, result.video, fps, lossless=args.lossless):
        print(f"wrote {path}")
    share = result.changed.float().mean().item()
    print(f"{share:.1%} of the pixels were free to change; {result.work.share:.1%} of the tokens were computed")
    print(f"{seconds:.1f} s")
    return 0


def _inpaint(args: argparse.Namespace, model: DiT, video: Tensor, mask: Tensor, sampling: Sampling) -> edit.Edit:
    return edit.inpaint(model, video, mask, args.caption, sampling)


def _outpaint(
    args: argparse.Namespace, model: DiT, video: Tensor, mask: Tensor | None, sampling: Sampling
) -> edit.Edit:
    return edit.outpaint(model, video, args.margins, args.caption, sampling)


def _recolour(
    args: argparse.Namespace, model: DiT, video: Tensor, mask: Tensor | None, sampling: Sampling
) -> edit.Edit:
    return edit.recolour(
        model, video, args.source, args.target, args.caption, sampling, mask=mask, strength=args.strength
    )


def _restyle(args: argparse.Namespace, model: DiT, video: Tensor, mask: Tensor | None, sampling: Sampling) -> edit.Edit:
    return edit.restyle(model, video, args.strength, args.caption, sampling, mask=mask)


def _motion_brush(
    args: argparse.Namespace, model: DiT, video: Tensor, mask: Tensor | None, sampling: Sampling
) -> edit.Edit:
    if (mask is None) == (args.colour is None):
        raise ValueError("motion-brush needs either --colour or a region (--mask, --box) to say what is moved")
    brush = objects.object_mask(video, args.colour) if mask is None else mask
    path = torch.tensor([(0.0, 0.0), *args.path] if len(args.path) == 1 else args.path)
    return edit.motion_brush(model, video, brush, path, args.caption, sampling, strength=args.strength)


def _region(args: argparse.Namespace, video: Tensor) -> Tensor | None:
    if getattr(args, "mask", None) is not None:
        return files.read_mask(args.mask, video)
    if getattr(args, "box", None) is not None:
        _, frames, height, width = video.shape
        return edit.moving_box((frames, height, width), args.box, args.box_to)
    return None


def _add_region(parser: argparse.ArgumentParser, *, required: bool) -> None:
    region = parser.add_mutually_exclusive_group(required=required)
    region.add_argument("--mask", metavar="FILE", help="a video or picture of the video's size, light where it changes")
    region.add_argument("--box", type=_numbers(4), metavar="X,Y,W,H", help="a box in pixels")
    parser.add_argument("--box-to", type=_numbers(2), metavar="X,Y", help="the corner to which the box moves in a line")


def _add_strength(parser: argparse.ArgumentParser, default: float) -> None:
    parser.add_argument(
        "--strength", type=float, default=default, help="how much is left to the model, to 1 (default: %(default)s)"
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    from stattn.cli import count, positive, triple

    defaults = Sampling()
    parser.add_argument("--caption", default="", help="what the result shows")
    parser.add_argument("--model", default="tiny", metavar="NAME", help="shipped weights, or a .safetensors file")
    parser.add_argument("--steps", type=positive, default=defaults.steps, help="for strength 1 (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=defaults.guidance, help="default: %(default)s")
    parser.add_argument("--shift", type=float, default=defaults.shift, help="default: %(default)s")
    parser.add_argument("--seed", type=count, default=defaults.seed)
    parser.add_argument(
        "--refresh",
        type=positive,
        default=defaults.refresh,
        metavar="STEPS",
        help="compute tokens outside the region only once in so many steps (default: 1, exact)",
    )
    parser.add_argument("--mask-attention", metavar="KEY", help='of every attention, for example "window(5, 7, 7)"')
    parser.add_argument(
        "--size", type=triple, default=defaults.size, metavar="T,H,W", help="the model works at (default: 16,64,64)"
    )
    parser.add_argument(
        "--overlap", type=positive, default=defaults.overlap, help="frames shared by parts (default: 4)"
    )
    parser.add_argument("--max-frames", type=positive, default=None, help="read no more (default: all)")
    parser.add_argument("--lossless", choices=files.LOSSLESS, default="ffv1", help="default: ffv1")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")


def _numbers(count: int, kind: Callable[[str], float] = int) -> Callable[[str], tuple[float, ...]]:
    def parse_numbers(text: str) -> tuple[float, ...]:
        try:
            values = tuple(kind(part) for part in text.split(","))
        except ValueError:
            values = ()
        if len(values) != count:
            raise argparse.ArgumentTypeError(f"{text!r} must be {count} numbers, separated by commas")
        return values

    return parse_numbers


def _points(text: str) -> list[tuple[float, ...]]:
    return [_numbers(2, float)(each) for each in text.split(";")]
