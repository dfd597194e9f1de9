"""`manipi demo`: record demonstrations, train, serve and drive a simulated arm."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from manipi.cli.arguments import Folder, NewFile, parse, table, write_result
from manipi.tabletop.recipes import DemoConfig


@dataclass(frozen=True, kw_only=True)
class _Demo:
    """Record demonstrations, check them, train a tiny policy, serve it, drive the arm on unseen scenes, report.

    Stages are kept: after Ctrl-C, or a crash, the same command goes on where it stopped.
    """

    demo: tyro.conf.OmitArgPrefixes[DemoConfig] = field(default_factory=DemoConfig)
    dir: Folder | None = None
    """Folder of everything. Default: runs/demo, or runs/demo_MODEL for another model than pi05."""
    json: NewFile | None = None
    """Write the result to this file too."""


def main(arguments: Sequence[str]) -> None:
    """Run all stages and print what came out."""
    args = parse(_Demo, arguments, "demo")
    folder = args.dir or Path("runs/demo" if args.demo.model == "pi05" else f"runs/demo_{args.demo.model}")

    from manipi.tabletop.demo import run_demo

    report = run_demo(folder, args.demo)
    rows = [(name.replace("_", " "), s.k, s.n, s.rate, s.low, s.high) for name, s in report.success.items()]
    print(f"\nsuccess on {args.demo.trials} scenes never seen, with 95 % intervals")
    print(table(rows, ("policy", "k", "n", "rate", "low", "high")))
    print(f"\ntrained (A) and untrained (B): {report.comparison.sentence(0.05)}")
    print("\n" + table([(stage, round(s, 1)) for stage, s in report.seconds.items()], ("stage", "seconds")))
    print(f"\nreport   {(folder / 'report.html').resolve()}\nnumbers  {(folder / 'report.json').resolve()}")
    write_result(report.to_json(), args.json)
