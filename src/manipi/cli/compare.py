"""`manipi compare`: which of several policies is better, by a test that may be looked at after every trial."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from manipi.cli.arguments import NewFile, OnDevice, parse, table, write_result
from manipi.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class _Compare(OnDevice):
    """Say which policy succeeds more often, on the same scenes with the same noise.

      manipi compare runs/a/evaluations/tabletop_reach_… runs/b/evaluations/…      results that are there
      manipi compare runs/a/best runs/b/best --suite tabletop/reach                trials in turns, until it is clear
      manipi compare a1,a2,a3 b1,b2,b3                                             several training runs of each recipe

    A winner is named wrongly in at most 5 % of all comparisons of equal policies, however often one looks.
    """

    policies: tyro.conf.Positional[tuple[str, ...]]
    """Two or more: results (result.json, LeRobot's eval_info.json, or their folders), checkpoints, or URLs."""
    suite: str | None = None
    """What to try checkpoints and servers in, as FAMILY/NAME."""
    trials: int | None = None
    """At most so many scenes. Default: the suite's own number."""
    seed: int = 0
    """Of the scenes and the noise."""
    margin: float = 5.0
    """Percentage points: `equivalent` is said where the whole interval lies within them."""
    execute_steps: int | None = None
    """Steps of each chunk to execute. Default: the suite's own number."""
    workers: int = 1
    """Simulators side by side."""
    json: NewFile | None = None
    """Write the comparison to this file."""


def main(arguments: Sequence[str]) -> None:
    """Compare all pairs; prints a table and a sentence for each."""
    args = parse(_Compare, arguments, "compare")

    from manipi.evaluate.compare import (
        Comparison,
        compare_groups,
        compare_policies,
        compare_results,
        is_result,
        read_side,
    )
    from manipi.evaluate.evaluation import Settings, require
    from manipi.evaluate.statistics import ALPHA
    from manipi.evaluate.suites import find_suite

    pairs = list(itertools.combinations(args.policies, 2))
    if not pairs:
        raise ConfigError(
            expected="two policies or more", found=f"{len(args.policies)}", where="manipi compare", next="name another"
        )
    require("--margin", args.margin, 0 <= args.margin <= 100, "percentage points from 0 to 100", "5")
    require("--workers", args.workers, args.workers >= 1, "a worker process or more", "2")
    margin, alpha = args.margin / 100, ALPHA / len(pairs)
    live = [source for source in args.policies if not is_result(source.split(",")[0])]
    if live and args.suite is None:
        raise ConfigError(
            expected="a suite to try policies in, or results in all places",
            found=f"no --suite, and no result in {live[0]}",
            where="manipi compare",
            next="--suite tabletop/reach, or name the result.json that manipi eval wrote",
        )

    def compare(a: str, b: str) -> Comparison:
        if "," in a + b:
            groups = [[read_side(Path(one)) for one in group.split(",")] for group in (a, b)]
            return compare_groups(*groups, margin=margin)
        if a not in live and b not in live:
            return compare_results(read_side(Path(a)), read_side(Path(b)), margin=margin, alpha=alpha)
        suite = find_suite(args.suite or "")
        settings = Settings(
            trials=suite.trials if args.trials is None else args.trials,
            seed=args.seed,
            execute_steps=suite.execute_steps if args.execute_steps is None else args.execute_steps,
        )
        server = {"device": args.device, "threads": args.num_threads or 1}
        return compare_policies(a, b, suite, settings, margin=margin, alpha=alpha, workers=args.workers, **server)

    found = [compare(a, b) for a, b in pairs]
    for one in found:
        rows = [(name, s.k, s.n, s.rate, s.low, s.high) for name, s in ((one.a, one.success_a), (one.b, one.success_b))]
        print(table(rows, ("", "k", "n", "rate", "low", "high")))
        print(f"{one.sentence(margin)}\n")
    write_result(found[0] if len(found) == 1 else {"comparisons": found}, args.json)
