"""What several candidates cost, and how much choosing among them could win and does.

    python benchmarks/bench_candidates.py CHECKPOINT
    python benchmarks/bench_candidates.py CHECKPOINT --ceiling tabletop/reach-light --candidates 8 --trials 200

The first measures the CPU time of an answer with 8 candidates beside that of an answer with one, at the demo's size and
with one thread: calls of all ways alternate, and the median of the ratios of each round counts.

The second drives a suite with one candidate; with candidate k in every answer of a trial, for each k; and with every
selector. The *ceiling* is the share of scenes in which any k succeeds. It is a bound for selectors that keep to one
index: one that changes the index from answer to answer may succeed where no fixed one does, and to try all of these
would be exponential in the answers of a trial. Scenes are the same throughout, so differences are paired. Trials are
kept, and the same command goes on with those that are missing.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Measure, report

from manipi.checkpoints.native import read_self_test
from manipi.cli.arguments import table
from manipi.evaluate.compare import compare_results, read_side_of
from manipi.evaluate.evaluation import Evaluation, Settings
from manipi.evaluate.policies import open_policy
from manipi.evaluate.statistics import success_rate
from manipi.evaluate.suites import find_suite
from manipi.policy import Policy
from manipi_client.keys import CANDIDATES, GATE, SELECTOR

GOAL = 1.25
"""Of 8 candidates, in answers with one, as `manipi serve` computes them. An engine without compilation is shown too."""


LAST = """def last(candidates):
    return range(len(candidates.actions))
"""
"""A selector's file: of k + 1 candidates, candidate k."""


def cost(checkpoint: Path, rounds: int) -> None:
    torch.set_num_threads(1)
    test, found = read_self_test(checkpoint), []
    assert test is not None, "a checkpoint has one"
    ways: dict[str, dict[str, Any]] = {
        "1": {},
        "8, medoid": {CANDIDATES: 8},
        "8, limits": {CANDIDATES: 8, SELECTOR: "limits"},
        "16, medoid": {CANDIDATES: 16},
        "8 behind a shut gate": {CANDIDATES: 8, GATE: 1e9},
        "8 behind an open gate": {CANDIDATES: 8, GATE: 0.0},
    }
    for path in ("plain", "engine"):
        policy = Policy.load(checkpoint)
        if path == "engine":
            policy.fuse()
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, asked in ways.items():
                began = time.process_time()
                policy.infer({**test.observation, **asked}, test.noise)
                times[way].append(time.process_time() - began)
        for way in ways:
            ratio = statistics.median(a / b for a, b in zip(times[way], times["1"], strict=True))
            print(f"{path}, {way}: {1000 * statistics.median(times[way]):.2f} CPU-ms, {ratio:.3f} of one")
            if (path, way) == ("plain", "8, medoid"):
                found.append(Measure(name=f"{path}, 8 / 1", value=ratio, unit="times", goal=GOAL))
    report(found)


def ceiling(checkpoint: str, name: str, n: int, trials: int, folder: Path) -> None:
    suite, fixed = find_suite(name), f"{(folder / 'last.py').resolve()}:last"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "last.py").write_text(LAST)
    settings = [Settings(trials=trials, execute_steps=suite.execute_steps)]
    more = [{"candidates": k, "selector": fixed} for k in range(2, n + 1)]
    more += [{"candidates": some, "selector": which} for which in ("medoid", "limits") for some in sorted({4, n})]
    settings += [Settings(trials=trials, execute_steps=suite.execute_steps, **one) for one in more]
    results = []
    with open_policy(checkpoint, selector=fixed) as opened:
        for one in settings:
            own = folder / suite.name.replace("/", "_") / f"{one.candidates or 1}_{(one.selector or '').split(':')[-1]}"
            with Evaluation(own, suite, one, opened.url, policy=opened.name, server=opened.server) as evaluation:
                evaluation.run()
                results.append(evaluation.finish())
    outcomes = np.array([[row["success"] for row in result["trials"]] for result in results])
    by_index, chosen = outcomes[:n], results[n:]
    rows = [("candidate 0", str(success_rate(int(by_index[0].sum()), trials)))]
    rows += [(f"candidates 0 to {n - 1}, mean", f"{by_index.mean():.1%}")]
    for some in sorted({1, 2, 4, n}):
        rows.append((f"any of {some}", str(success_rate(int(by_index[:some].any(0).sum()), trials))))
    print(f"{suite.name}, {trials} scenes\n{table(rows)}")
    one = read_side_of(results[0])
    for result in chosen:
        side = read_side_of(result)
        found = compare_results(side, one, margin=0.05, alpha=0.05)
        print(f"\n{side.name} (A) beside candidate 0 (B)\n{found.sentence(0.05)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="manipi demo makes one")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--ceiling", metavar="SUITE")
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--dir", type=Path, default=Path("evaluations/candidates"))
    args = parser.parse_args()
    if args.ceiling:
        ceiling(args.checkpoint, args.ceiling, args.candidates, args.trials, args.dir)
    else:
        cost(Path(args.checkpoint), args.rounds)


if __name__ == "__main__":
    main()
