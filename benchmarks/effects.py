"""What each part of the whole π0.5 changes, on the tabletop's suites: paired differences with their intervals.

    python benchmarks/effects.py                            all
    python benchmarks/effects.py --parts memory subtasks    two of them
    python benchmarks/effects.py --table docs/results       and the tables, as docs/make_results.py reads them

joint       flow, codes and insulation beside the flow alone, at equal steps and at equal seconds of training; and
            without insulation
subtasks    not trained; trained as text but not written; written at every answer
memory      four pictures, 8 control steps apart, beside one
candidates  1, 4 and 8 chunks for each answer, and the share of scenes in which any of 8 succeeds

Every policy has the demo's size and demonstrations. Datasets, runs and evaluations are in one folder, which
benchmarks/suites.py shares; after a kill the same command goes on.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_candidates import LAST
from suites import Lab

from manipi.evaluate.compare import compare_results, read_side_of
from manipi.evaluate.statistics import success_rate

COLUMNS = ["suite", "what", "success", "beside", "success of that", "difference, points", "verdict"]
PERTURBED = ("reach", "reach-light", "reach-background", "reach-start")
STEPS, SECONDS = 4_000, 2_500
"""Of training; and the steps of joint training, each 1.58 times as long, that take the same time."""


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: its name, and its result in a suite."""

    name: str
    result: dict[str, Any]

    @property
    def rate(self) -> str:
        found = self.result["success"]
        return f"{found['k']}/{found['n']} ({100 * found['low']:.0f} to {100 * found['high']:.0f} %)"


def beside(suite: str, a: Arm, b: Arm) -> list[str]:
    """A row of the table: A, B, and A - B on the same scenes."""
    found = compare_results(read_side_of(a.result), read_side_of(b.result), margin=0.05, alpha=0.05)
    assert found.paired, found.why_unpaired
    points = f"{100 * found.difference:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"
    verdict = {"a": f"{a.name}", "b": f"{b.name}"}.get(found.verdict, found.verdict)
    return [f"tabletop/{suite}", a.name, a.rate, b.name, b.rate, points, verdict]


def joint(lab: Lab) -> list[list[str]]:
    flow = lab.trained("reach", "pi05", "tabletop")
    whole = lab.trained("reach", "joint", "tabletop_joint", STEPS)
    as_long = lab.trained("reach", "joint", "tabletop_joint", SECONDS)
    free = lab.trained("reach", "joint_free", "tabletop_joint", STEPS, "--model.joint.no-insulate")
    rows = []
    for suite in PERTURBED:
        plain = Arm("flow alone", lab.evaluated(flow, suite))
        rows.append(beside(suite, Arm("joint, equal steps", lab.evaluated(whole, suite)), plain))
        rows.append(beside(suite, Arm("joint, equal seconds", lab.evaluated(as_long, suite)), plain))
        rows.append(beside(suite, Arm("joint without insulation, equal steps", lab.evaluated(free, suite)), plain))
    codes = Arm("joint, its codes", lab.evaluated(whole, "reach", "--mode", "tokens"))
    return [*rows, beside("reach", codes, Arm("joint, its flow", lab.evaluated(whole, "reach")))]


def subtasks(lab: Lab) -> list[list[str]]:
    off = Arm("not trained", lab.evaluated(lab.trained("two-step", "pi05", "tabletop"), "two-step"))
    checkpoint = lab.trained("two-step", "subtask", "tabletop_subtask", STEPS)
    trained = Arm("trained, not written", lab.evaluated(checkpoint, "two-step"))
    written = Arm("trained, written", lab.evaluated(checkpoint, "two-step", "--subtask-every", 1))
    return [beside("two-step", trained, off), beside("two-step", written, off), beside("two-step", written, trained)]


def memory(lab: Lab) -> list[list[str]]:
    one = Arm("one picture", lab.evaluated(lab.trained("memory", "pi05", "tabletop"), "memory"))
    four = Arm("with its past", lab.evaluated(lab.trained("memory", "memory", "tabletop_memory"), "memory"))
    return [beside("memory", four, one)]


def candidates(lab: Lab) -> list[list[str]]:
    checkpoint, suite = lab.trained("reach", "pi05", "tabletop"), "reach-light"
    one = Arm("1 candidate", lab.evaluated(checkpoint, suite))
    rows = []
    for n, selector in ((4, "medoid"), (8, "medoid"), (4, "limits"), (8, "limits")):
        some = lab.evaluated(checkpoint, suite, "--candidates", n, "--selector", selector)
        rows.append(beside(suite, Arm(f"{n}, {selector}", some), one))
    last = lab.folder / "last.py"
    last.write_text(LAST)
    every = [one.result]  # of k candidates, the last one; candidate 0 is the single chunk
    for k in range(2, 9):
        every.append(lab.evaluated(checkpoint, suite, "--candidates", k, "--selector", f"{last.resolve()}:last"))
    won = [any(trials) for trials in zip(*([row["success"] for row in result["trials"]] for result in every))]
    best, alone = success_rate(sum(won), len(won)), one.result["success"]
    ceiling = f"{best.k}/{best.n} ({100 * best.low:.0f} to {100 * best.high:.0f} %)"
    gain = f"{100 * (best.rate - alone['rate']):+.1f}"
    return [*rows, [f"tabletop/{suite}", "any of 8 (ceiling)", ceiling, one.name, one.rate, gain, "a bound"]]


PARTS: dict[str, tuple[str, Callable[[Lab], list[list[str]]]]] = {
    "joint": ("Codes and insulation beside the flow alone", joint),
    "subtasks": ("Subtasks", subtasks),
    "memory": ("Memory in time", memory),
    "candidates": ("Several candidates", candidates),
}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/suites"))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2, help="simulators side by side")
    parser.add_argument("--table", type=Path, help="folder to write a result file of each part to")
    args = parser.parse_args(arguments)
    lab = Lab(args.dir, trials=args.trials, workers=args.workers)
    for name in args.parts:
        title, measure = PARTS[name]
        rows = measure(lab)
        print(f"\n{title}")
        for row in [COLUMNS, *rows]:
            print("  ".join(row))
        if args.table:
            text = (
                f"Paired on {args.trials} scenes, seed 0; {lab.episodes} demonstrations. One training each: what "
                "differs from training to training is not in the intervals, which are of the difference, at 95 %. "
                "A verdict holds for its row at a level of 5 %; equivalent: within 5 points."
            )
            command = f"python benchmarks/effects.py --parts {name} --table docs/results"
            found = {"title": title, "command": command, "text": text, "columns": COLUMNS, "rows": rows}
            (args.table / f"effects_{name}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
