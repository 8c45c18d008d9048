"""`stattn report`: results files as a Markdown table, a page with plots, and github-action-benchmark's JSON."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from stattn.reports import report

MARKDOWN, PAGE = "report.md", "index.html"
SMALLER, BIGGER = "smaller-is-better.json", "bigger-is-better.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `stattn report`."""
    parser.add_argument("paths", nargs="+", metavar="FILES_OR_FOLDER", help="results files, or folders of them")
    parser.add_argument("--out", default="out/report", metavar="DIR", help="default: out/report")


def main(args: argparse.Namespace) -> int:
    """Write the report, and say where it is."""
    from stattn.reports.page import render

    sources, others = report.load(args.paths)
    tests = report.read_test_runs(args.paths)
    for each in others:
        print(f"stattn report: left out: {each}", file=sys.stderr)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKDOWN).write_text(report.markdown(sources, others, tests), encoding="utf-8")
    (out / PAGE).write_text(render(sources, others, tests, args.command_line), encoding="utf-8")
    print(report.summary(sources))
    print(f"{out / PAGE}\n{out / MARKDOWN}")
    for name, entries in zip((SMALLER, BIGGER), report.action_entries(sources), strict=True):
        if not entries:  # the action refuses a file without entries
            (out / name).unlink(missing_ok=True)
            continue
        (out / name).write_text(json.dumps(entries, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        print(f"{out / name}: {len(entries)} entries for github-action-benchmark")
    return 0
