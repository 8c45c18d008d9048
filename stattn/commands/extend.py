"""`stattn extend`: continue a video file."""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from stattn import dit
from stattn.dit import DiT
from stattn.video import adapted, files, long, media
from stattn.video.adapted import Adapted
from stattn.video.paint import Sampling, Work


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `stattn extend`."""
    from stattn.cli import count, positive, triple

    parser.add_argument("video", metavar="IN", help="a video file of the height and width of --size, or enlarged")
    parser.add_argument("out", metavar="OUT.mp4", help="the longer video; a lossless file is written beside it")
    parser.add_argument("--frames", type=positive, required=True, help="how many to add")
    parser.add_argument("--caption", default="", help="what is seen")
    parser.add_argument("--model", default="tiny", metavar="NAME", help="shipped weights, or a .safetensors file")
    parser.add_argument("--memory", metavar="NAME", help="weights of memory tokens, in place of --model")
    parser.add_argument("--steps", type=positive, default=30, help="default: 30")
    parser.add_argument("--guidance", type=float, default=1.5, help="default: 1.5")
    parser.add_argument("--seed", type=count, default=0)
    parser.add_argument("--size", type=triple, default=(16, 64, 64), metavar="T,H,W")
    parser.add_argument("--overlap", type=positive, default=4, help="frames that windows share (default: 4)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")


def main(args: argparse.Namespace) -> int:
    """Read, continue, write."""
    files.out_path(args.out)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    video, fps = files.read_clip(args.video)
    video = _at_size(args.video, video, args.size[1:])
    model: DiT | Adapted
    if args.memory is None:
        model = dit.load(args.model, dtype=dtype, device=device)
    else:
        model = adapted.load(args.memory, dtype=dtype, device=device)
    sampling = Sampling(args.steps, args.guidance, seed=args.seed, size=args.size, overlap=args.overlap)
    work, began = Work(), time.perf_counter()
    made = long.extend(model, video.float() / 127.5 - 1, args.frames, args.caption, sampling, work=work)
    whole = torch.cat((video, media.to_uint8(made)[:, video.shape[1] :]), 1)
    for path in files.write_result(args.out, whole, fps):
        print(f"wrote {path}")
    print(f"{args.frames} frames in {time.perf_counter() - began:.1f} s")
    return 0


def _at_size(name: str, video: Tensor, size: tuple[int, int]) -> Tensor:
    """Shrink a clip uint8 [3, T, H, W] that was enlarged whole times. Raises ValueError for another size."""
    height, width = video.shape[2:]
    times = height // size[0]
    if (height, width) == size:
        return video
    if times == 0 or (height, width) != (times * size[0], times * size[1]):
        raise ValueError(
            f"{name!r} is {height} x {width} pixels, no whole times the {size[0]} x {size[1]} of --size: scale it"
        )
    print(f"{name} is taken at {size[0]} x {size[1]} pixels, 1 of {times} on a side")
    return media.to_uint8(F.avg_pool2d(video.transpose(0, 1).float(), times).transpose(0, 1) / 127.5 - 1)
