"""The reference policy in every suite of the tabletop: record, train, evaluate; a table of success at the end.

    python benchmarks/suites.py                                  all
    python benchmarks/suites.py --suites crowd --controls blind  one, and what it is won with by not looking

The policy is the demo's, of its size, on as many demonstrations, for as many steps. One is trained for each suite, but
memory and those named reach-… are driven by that of tabletop/reach, which has seen nothing of what they change. Every
stage is kept in the folder, and the same command goes on where it stopped. With all suites, their table is there as
docs/make_results.py reads it.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import manipi

from manipi.model.config import Pi0FastConfig
from manipi.recipes.registry import load_recipe
from manipi.tabletop.recipes import RECIPES, DemoConfig
from manipi.tabletop.suites import SUITES

LONGER = {"two-step": 12}
"""More tokens of the prompt than the recipe has."""
LEARNED: dict[str, str] = {name: "reach" for name in SUITES if name.startswith("reach-")} | {"memory": "reach"}
"""Suites whose policy was trained on another one's demonstrations."""


@dataclass(frozen=True)
class Lab:
    """A folder of demonstrations, training runs and evaluations; what is there is not made again."""

    folder: Path
    episodes: int = DemoConfig.episodes
    trials: int = 200
    workers: int = 2
    seed: int = 0
    """Of trainings."""

    def demonstrations(self, suite: str) -> Path:
        """Of the scripted expert, as many and as disturbed as the demo's."""
        dataset = self.folder / suite / f"dataset_{self.episodes}"
        if not dataset.exists():
            made = ("--episodes", self.episodes, "--noise", 0.0, 0.0, 0.3, "--workers", self.workers)
            manipi("demonstrate", f"tabletop/{suite}", dataset, *made)
        return dataset

    def trained(self, suite: str, name: str, recipe: str, steps: int | None = None, *flags: object) -> Path:
        """The last checkpoint of a recipe that was trained on a suite's demonstrations; its run has a name.

        Args:
            flags: more of them for `manipi train`; the name should say so.
        """
        config = load_recipe(recipe)
        steps, room = steps or config.steps, config.model.max_token_len
        # Every suite of π0-FAST, whose actions follow the prompt, has the longest prompt's tokens.
        room += max(LONGER.values()) if isinstance(config.model, Pi0FastConfig) else LONGER.get(suite, 0)
        run = self.folder / suite / f"{name}_{self.episodes}_{steps}_seed_{self.seed}"
        checkpoint = run / "checkpoints" / str(steps)
        if not checkpoint.exists():
            dataset = ("--run-dir", run, "--data.path", self.demonstrations(suite))
            numbers = {"steps": steps, "seed": self.seed, "model.max-token-len": room}
            if steps != config.steps:
                numbers["optimizer.decay-steps"] = steps
            given = (text for key, value in numbers.items() for text in (f"--{key}", value))
            manipi("train", recipe, *dataset, *given, *flags)
        return checkpoint

    def evaluated(self, checkpoint: Path, suite: str, *flags: object) -> dict[str, Any]:
        """The result of a checkpoint in a suite, with flags of `manipi eval`."""
        name = "_".join((suite, *(str(flag).rpartition("/")[2].strip("-") for flag in flags)))
        folder = checkpoint.parents[1] / "evaluations" / name
        trials = ("--suite", f"tabletop/{suite}", "--trials", self.trials, "--workers", self.workers)
        manipi("eval", checkpoint, *trials, "--dir", folder, "--films", 4, *flags)
        return json.loads((folder / "result.json").read_text())


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
    lab, rows = Lab(args.dir, args.episodes, args.trials, args.workers, args.seed), []
    for name in args.suites:
        checkpoint = lab.trained(str(LEARNED.get(name, name)), args.model, RECIPES[args.model], args.steps)
        for control in (None, *args.controls):
            result = lab.evaluated(checkpoint, name, *(() if control is None else (f"--{control}",)))
            rows.append((name, control or "policy", result["success"], result["trials"]))
    steps = args.steps or load_recipe(RECIPES[args.model]).steps
    print(f"\n{RECIPES[args.model]}, {args.episodes} episodes, {steps} steps, seed {args.seed}")
    print(f"{'suite':18} {'':12} {'success':>9} {'95 % interval':>15} {'wrong block':>12} {'too late':>9}  what")
    for name, control, success, trials in rows:
        failures = [trial["failure"] for trial in trials]
        print(
            f"{name:18} {control:12} {success['k']:4}/{success['n']:<4} {success['low']:7.1%} {success['high']:7.1%}"
            f" {failures.count('wrong_block'):12} {failures.count('max_steps'):9}  {SUITES[name].about}"
        )
    if args.suites == list(SUITES):
        trained = f"{args.episodes} demonstrations, {steps} steps, one training each (seed {args.seed})"
        found = {
            "title": f"The tabletop's suites: the demo's policy ({args.model})",
            "command": f"make suites MODEL={args.model}",
            "text": f"Seed 0. The recipe {RECIPES[args.model]}, {trained}; memory and all called reach share a policy.",
            "columns": ["suite", "", "success", "another object", "too late", "what"],
            "rows": [
                [
                    f"tabletop/{name}",
                    control,
                    f"{success['k']}/{success['n']} ({100 * success['low']:.0f} to {100 * success['high']:.0f} %)",
                    str([trial["failure"] for trial in trials].count("wrong_block")),
                    str([trial["failure"] for trial in trials].count("max_steps")),
                    SUITES[name].about,
                ]
                for name, control, success, trials in rows
            ],
        }
        table = args.dir / f"suites_{args.model}.json"
        table.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        print(f"table  {table}")
    print(json.dumps([{"suite": name, "control": control, **success} for name, control, success, _ in rows]))


if __name__ == "__main__":
    main()
