"""What a tiny policy learns of a suite's expert: record, check, train, serve, and drive it beside its controls.

    python benchmarks/learn.py metaworld/four --recipe simulators/metaworld/recipe.py:pi05_metaworld

DIR/dataset, check.json, run/       the demonstrations and the training run
DIR/evaluations/                    one folder for the policy and for each control
DIR/table.json                      the table, as docs/make_results.py reads it

Every stage is a `manipi` command that is printed before it runs, and is skipped where its result is there: after a kill
the same command goes on.
"""

import argparse
import json
import os
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path

from harness import manipi

from manipi.evaluate.statistics import success_rate

POLICIES = {"trained": "", "blind": "--blind", "wrong words": "--wrong-words", "untrained": "--untrained"}


def main() -> None:
    parser = argparse.ArgumentParser(description="What a tiny policy learns of a suite's expert.")
    parser.add_argument("suite", help="FAMILY/NAME")
    parser.add_argument("--recipe", required=True, help="FILE.py:FUNCTION or a recipe's name; its robot is recorded")
    parser.add_argument("--dir", type=Path, required=True, help="folder of everything")
    parser.add_argument("--lessons", default="", help="suite to record the demonstrations in (default: the same)")
    parser.add_argument("--episodes", type=int, default=600, help="demonstrations to make")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.3, 0.6], help="disturbances, in turns")
    parser.add_argument("--steps", type=int, help="training steps (default: the recipe's)")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the trials; 0 for results, 1 to choose by")
    parser.add_argument("--title", default="", help="heading of the table")
    parser.add_argument("--command", default="", help="what the table says it was made with")
    args = parser.parse_args()
    folder, dataset, run = args.dir, args.dir / "dataset", args.dir / "run"
    folder.mkdir(parents=True, exist_ok=True)
    mine = {name: getattr(args, name) for name in ("suite", "lessons", "recipe", "episodes", "noise", "steps")}
    claim = folder / "learn.json"
    if not claim.exists():
        claim.write_text(json.dumps(mine))
    if (before := json.loads(claim.read_text())) != mine:
        sys.exit(f"{folder} has what was learnt with {before}, not {mine}: name another --dir, or delete it")

    def stage(name: str, *arguments: object) -> None:
        """Runs a command and adds its time to the stage's, over all runs of this folder."""
        began, path = time.monotonic(), folder / "seconds.json"
        try:
            manipi(*(argument for argument in arguments if argument != ""))
        finally:
            seconds = json.loads(path.read_text()) if path.exists() else {}
            seconds[name] = seconds.get(name, 0.0) + time.monotonic() - began
            path.with_suffix(".partial").write_text(json.dumps(seconds))
            path.with_suffix(".partial").replace(path)

    if not dataset.exists():
        made = ("--robot", args.recipe, "--episodes", args.episodes, "--noise", *args.noise)
        stage("record", "demonstrate", args.lessons or args.suite, dataset, *made, "--workers", 2)
    if not (folder / "check.json").exists():
        found = folder / "findings.json"  # written where there are errors, too
        stage("check", "check", dataset, "--robot", args.recipe, "--json", found)
        found.replace(folder / "check.json")
    if not (folder / "trained.json").exists():
        steps = () if args.steps is None else ("--steps", args.steps, "--optimizer.decay-steps", args.steps)
        stage("train", "train", args.recipe, "--run-dir", run, "--data.path", dataset, *steps)
        checkpoint = run / "checkpoints" / str(json.loads((run / "config.json").read_text())["steps"])
        if not checkpoint.exists():  # a signal ended it, which is no fault of its own
            sys.exit("training stopped before its last step: run the same command again")
        (folder / "trained.json").write_text(json.dumps({"checkpoint": str(checkpoint)}))
    checkpoint = json.loads((folder / "trained.json").read_text())["checkpoint"]
    results = {}
    for name, flag in POLICIES.items():
        place = folder / "evaluations" / f"{name.replace(' ', '_')}_seed_{args.seed}_of_{args.trials}"
        if not (place / "result.json").exists():
            settings = ("--suite", args.suite, "--trials", args.trials, "--seed", args.seed, "--workers", 2)
            stage(f"drive {name}", "eval", checkpoint, *settings, flag, "--dir", place)
        results[name] = json.loads((place / "result.json").read_text())
    seconds = json.loads((folder / "seconds.json").read_text())
    found = table(results, seconds, args.title or args.suite, args.command or shlex.join(["python", *sys.argv]))
    (folder / "table.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    widths = [max(len(row[i]) for row in (found["columns"], *found["rows"])) for i in range(len(found["columns"]))]
    for row in (found["columns"], *found["rows"]):
        print("  ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)))
    print(f"\n{found['text']}\ntable  {folder / 'table.json'}")


def table(results: dict[str, dict], seconds: dict[str, float], title: str, command: str) -> dict:
    """What docs/make_results.py reads: a row per task and one for all; successes, rate and 95 % interval."""
    tasks = list(dict.fromkeys(trial["task"] for trial in results["trained"]["trials"]))
    rows = []
    for label, chosen in (*((task, (task,)) for task in tasks), ("all", tasks)):
        cells = []
        for result in results.values():
            outcomes = [trial["success"] for trial in result["trials"] if trial["task"] in chosen]
            rate = success_rate(sum(outcomes), len(outcomes))
            cells.append(f"{rate.k}/{rate.n} ({100 * rate.low:.0f} to {100 * rate.high:.0f} %)")
        rows.append([label, *cells])
    trained = results["trained"]
    minutes = {name: spent / 60 for name, spent in seconds.items()}
    text = (
        f"Suite {trained['suite']}, seed {trained['seed']}, step {trained['step']} of the training run. "
        + "Minutes: "
        + ", ".join(f"{name} {spent:.1f}" for name, spent in minutes.items())
        + f"; {len(os.sched_getaffinity(0))} cores, manipi {version('manipi')}, torch {version('torch')}."
    )
    return {"title": title, "command": command, "text": text, "columns": ["task", *results], "rows": rows}


if __name__ == "__main__":
    main()
