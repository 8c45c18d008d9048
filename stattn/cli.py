"""The `stattn` command: `stattn demo`, `stattn sample` and the others of ``COMMANDS``.

A subcommand is a module with `add_arguments(parser)` and `main(args) -> int`; only the one that is asked for is
imported.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

# name: (module, what it does)
COMMANDS = {
    "demo": (
        "stattn.commands.demo",
        "sample the shipped model under several masks and write a page of clips and timings",
    ),
    "sample": ("stattn.commands.sample", "sample one clip from a caption into a file"),
    "train": ("stattn.train", "train a video model on the synthetic world"),
    "bench": ("stattn.commands.bench", "measure operations, attention, a denoising step or a sample of a named model"),
    "explain": (
        "stattn.commands.explain",
        "say which implementation serves an attention call, and why the others do not",
    ),
    "doctor": ("stattn.commands.doctor", "describe this machine, and what stattn runs on it"),
    "report": ("stattn.commands.report", "write results files as a table, a page with plots, and JSON for CI"),
    "storyboard": ("stattn.commands.storyboard", "make a long video of an object that follows a plot"),
    "edit": ("stattn.commands.edit", "edit a video file: inpaint, outpaint, recolour, restyle, motion-brush"),
    "study": ("stattn.commands.study", "run an experiment about video: edits, story, length, consistency"),
    "gallery": ("stattn.commands.gallery", "make a page of clips that shows what the video system does"),
    "extend": ("stattn.commands.extend", "continue a video file"),
    "camera": ("stattn.commands.camera", "sample a clip filmed by a given camera move"),
    "evaluate": ("stattn.metrics.evaluate", "measure a folder of video files, or compare two"),
    "compare": ("stattn.commands.compare", "compare two runs, and fail where the new one is worse"),
    "profile": ("stattn.commands.profile", "run a program under a profiler, with ranges around what stattn does"),
}
REFUSALS = (ValueError, TypeError, ImportError, OSError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (argv: without the program's name; None takes this process's) and return its exit status.

    0: done. 1: refused, with one line on stderr that says why (--traceback shows where). 2: not a valid command line.
    130: stopped by Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    args, unknown = _parser(arguments).parse_known_args(arguments)
    if unknown:  # with the usage of the command, which argparse would not show
        args.parser.error(f"unrecognized arguments: {shlex.join(unknown)}")
    args.command_line = shlex.join(["stattn", *arguments])
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        print("stattn: stopped", file=sys.stderr)
        return 130
    except REFUSALS as error:
        if args.traceback:
            traceback.print_exc()
        else:
            print(f"stattn {args.command}: {error}", file=sys.stderr)
        return 1


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stattn", description="Fast exact 3D attention for video diffusion transformers."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parser.add_argument("--traceback", action="store_true", help="show where an error arose, not only what it says")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (module, purpose) in COMMANDS.items():
        child = commands.add_parser(name, help=purpose, description=purpose[0].upper() + purpose[1:] + ".")
        if name in arguments:
            command = import_module(module)
            command.add_arguments(child)
            child.set_defaults(run=command.main, parser=child)
    return parser


class _Version(argparse.Action):
    """Print the version; the package is imported only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from stattn import __version__

        print(f"stattn {__version__}")
        parser.exit()


def triple(text: str) -> tuple[int, int, int]:
    """Parse "21,45,80" or "21x45x80" as three positive integers, for argparse."""
    try:
        t, h, w = (int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be three integers like 21,45,80") from None
    if min(t, h, w) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be three positive integers")
    return t, h, w


def positive(text: str) -> int:
    """Parse a positive integer, for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive integer")
    return value


def count(text: str) -> int:
    """Parse a non-negative integer, for argparse."""
    return 0 if text.strip() == "0" else positive(text)


if __name__ == "__main__":
    sys.exit(main())
