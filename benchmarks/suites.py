"""The reference policy in every suite of the tabletop: record, train, evaluate; a table of success at the end.

    python benchmarks/suites.py                                  all
    python benchmarks/suites.py --suites crowd --controls blind  one, and what it is won with by not looking

The policy is the demo's, of its size, on as many demonstrations, for as many steps. One is trained for each suite, but
those named reach-… are driven by that of tabletop/reach, which has seen nothing of what they change. Every stage is
kept in the folder, and the same command goes on where it stopped.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from manipi.recipes.registry import load_recipe
from manipi.tabletop.recipes import RECIPES, DemoConfig
from manipi.tabletop.suites import SUITES

LONGER = {"two-step": 12}
"""More tokens of the prompt than the recipe has; every suite of π0-FAST, whose actions follow the prompt, has these."""


def manipi(*arguments: str) -> None:
    command = [sys.executable, "-m", "manipi", *arguments]
    print("$ manipi " + " ".join(arguments), flush=True)
    subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/suites"))
    parser.add_argument("--suites", nargs="+", default=list(SUITES), choices=list(SUITES), metavar="NAME")
    parser.add_argument("--model", default="pi05", choices=list(RECIPES))
    parser.add_argument("--episodes", type=int, default=DemoConfig.episodes)
    parser.add_argument("--steps", type=int, help="of training; default: the recipe's")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--workers", type=int, default=2, help="simulators side by side")
    parser.add_argument("--controls", nargs="*", default=[], choices=["untrained", "blind", "wrong-words", "held"])
    args = parser.parse_args()
    recipe, rows = load_recipe(RECIPES[args.model]), []
    steps, workers = args.steps or recipe.steps, ("--workers", str(args.workers))
    for name in args.suites:
        learned = "reach" if name.startswith("reach") else name
        dataset = args.dir / learned / f"dataset_{args.episodes}"
        run = args.dir / learned / f"{args.model}_{args.episodes}_{steps}_seed_{args.seed}"
        checkpoint = run / "checkpoints" / str(steps)
        if not dataset.exists():
            demonstrated = ("--episodes", str(args.episodes), "--noise", "0.0", "0.0", "0.3")
            manipi("demonstrate", f"tabletop/{learned}", str(dataset), *demonstrated, *workers)
        if not checkpoint.exists():
            more = max(LONGER.values()) if args.model == "pi0_fast" else LONGER.get(learned, 0)
            numbers = {"steps": steps, "seed": args.seed, "model.max-token-len": recipe.model.max_token_len + more}
            flags = [text for key, value in numbers.items() for text in (f"--{key}", str(value))]
            manipi("train", RECIPES[args.model], "--run-dir", str(run), "--data.path", str(dataset), *flags)
        for control in (None, *args.controls):
            folder = run / "evaluations" / "_".join(filter(None, (name, control)))
            flags = () if control is None else (f"--{control}",)
            trials = ("--suite", f"tabletop/{name}", "--trials", str(args.trials), "--dir", str(folder), "--films", "4")
            manipi("eval", str(checkpoint), *trials, *workers, *flags)
            result = json.loads((folder / "result.json").read_text())
            rows.append((name, control or "policy", result["success"], result["trials"]))
    print(f"\n{RECIPES[args.model]}, {args.episodes} episodes, {steps} steps, seed {args.seed}")
    print(f"{'suite':18} {'':12} {'success':>9} {'95 % interval':>15} {'wrong block':>12} {'too late':>9}  what")
    for name, control, success, trials in rows:
        failures = [trial["failure"] for trial in trials]
        print(
            f"{name:18} {control:12} {success['k']:4}/{success['n']:<4} {success['low']:7.1%} {success['high']:7.1%}"
            f" {failures.count('wrong_block'):12} {failures.count('max_steps'):9}  {SUITES[name].about}"
        )
    print(json.dumps([{"suite": name, "control": control, **success} for name, control, success, _ in rows]))


if __name__ == "__main__":
    main()
