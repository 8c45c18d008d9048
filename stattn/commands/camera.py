"""`stattn camera`: a clip filmed by a camera move that is given by numbers, or taken from a reference clip."""

from __future__ import annotations

import argparse

import torch

from stattn.video import adapted, files
from stattn.video.camera import Move, maps_of_clip, moves_seen, ray_maps
from stattn.video.paint import Sampling, paint
from stattn.world.scene import CAMERA_FIELDS

# What one unit of each field is, for --help.
UNITS = {
    "pan_x": "pixels of 64 a frame, to the right",
    "pan_y": "pixels of 64 a frame, down",
    "zoom": "logarithm of the magnification over the clip",
    "dolly": "forwards over the clip, where the scenery is 4 and 2 away",
    "roll": "radians a frame",
    "track": "pixels of 64 a frame, at depth 1",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `stattn camera`."""
    from stattn.cli import count, positive, triple

    parser.add_argument("out", metavar="OUT.mp4", help="the clip; a lossless file is written beside it")
    parser.add_argument("--caption", default="", help="what is seen; the camera needs no words")
    parser.add_argument("--weights", default="camera", metavar="NAME", help="of the adapter (default: camera)")
    parser.add_argument("--reference", metavar="FILE", help="take the move from this video file")
    for name in CAMERA_FIELDS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=0.0, help=UNITS[name])
    parser.add_argument("--first-frame", metavar="FILE", help="begin with the first frame of this video file")
    parser.add_argument("--steps", type=positive, default=30, help="default: 30")
    parser.add_argument("--guidance", type=float, default=1.5, help="default: 1.5")
    parser.add_argument("--seed", type=count, default=0)
    parser.add_argument("--size", type=triple, default=(16, 64, 64), metavar="T,H,W")
    parser.add_argument("--fps", type=float, default=8)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")


def main(args: argparse.Namespace) -> int:
    """Sample, write, and say what move is seen in the result."""
    files.out_path(args.out)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    frames, height, width = args.size
    move = Move(**{name: getattr(args, name) for name in CAMERA_FIELDS})
    if (args.reference is None) == (move == Move()):
        raise ValueError("give a move, by --reference or by numbers such as --pan-x 1.5, and not both")
    if args.reference is None:
        maps = ray_maps(move.path(frames, height, width), height, width)
    else:
        reference, _ = files.read_clip(args.reference, max_frames=frames)
        if reference.shape[1] != frames:
            raise ValueError(f"--reference {args.reference!r} has {reference.shape[1]} frames; {frames} are needed")
        maps = maps_of_clip(reference[None].float() / 127.5 - 1, height=height, width=width)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = adapted.load(args.weights, dtype=dtype, device=device)
    rough, strength = torch.zeros(1, 3, frames, height, width), torch.ones(1, 1, frames, height, width)
    if args.first_frame is not None:
        first, _ = files.read_clip(args.first_frame, max_frames=1)
        if tuple(first.shape[2:]) != (height, width):
            raise ValueError(
                f"--first-frame {args.first_frame!r} is {first.shape[2]} x {first.shape[3]}, not {height} x {width}"
            )
        rough[0, :, :1], strength[:, :, :1] = first.float() / 127.5 - 1, 0
    sampling = Sampling(args.steps, args.guidance, seed=args.seed, size=args.size, overlap=min(4, frames - 1))
    call = model.steered(ray_map=maps.to(device))
    video = paint(model.base, rough, strength, [args.caption], sampling, call=call)[0].cpu()
    for path in files.write_result(args.out, video, args.fps):
        print(f"wrote {path}")
    pan_x, pan_y, zoom, roll = moves_seen(video[None])[0].tolist()
    scale = 64 / min(height, width)
    print(
        f"seen: --pan-x {scale * pan_x:.2f} --pan-y {scale * pan_y:.2f} --zoom {zoom:.2f} "
        f"--roll {roll / max(1, frames - 1):.4f}"
    )
    return 0
