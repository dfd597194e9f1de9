"""Rollouts while a policy is trained: this process serves it, and simulators of a suite drive it."""

from pathlib import Path

from manipi.evaluate.evaluation import Evaluation, Settings, require_fit
from manipi.evaluate.suites import find_suite
from manipi.policy import Policy
from manipi.serve.batching import Limits
from manipi.serve.server import PolicyServer
from manipi.train.config import TrainConfig
from manipi.train.watch.validation import Rollouts

SEED = -1
"""Of scenes and noise: others than those that a result is reported on, since the best checkpoint is chosen by these."""


def rollouts_of(config: TrainConfig) -> Rollouts | None:
    """What `config.validation` asks for; None where it names no suite.

    Raises:
        UnknownNameError: there is no such suite.
        SimulatorError: it is not installed, or for another robot.
        ConfigError: it executes more steps than the policy predicts.
    """
    asked = config.validation
    if not asked.suite:
        return None
    suite = find_suite(asked.suite)
    settings = Settings(trials=asked.trials, seed=SEED, execute_steps=suite.execute_steps)
    known = {"robot": {"name": config.robot.name}, "action_horizon": config.model.action_horizon}
    require_fit(known, suite, settings)

    def drive(policy: Policy, folder: Path, show: bool) -> dict[str, float]:
        # One observation in each call of the model: an answer is then the same whoever else asks.
        limits = Limits(max_batch=1)
        server = PolicyServer(policy, port=0, robot=policy.robot, empty_prompts=True, limits=limits)
        with server.serve_in_thread() as port:
            named = {"policy": f"step {policy.config.step}", "workers": asked.workers}
            with Evaluation(folder, suite, settings, f"ws://127.0.0.1:{port}", **named) as evaluation:
                evaluation.run(show=show)
                evaluation.finish()
        found = evaluation.success()
        return {"success": found.rate, "success_low": found.low, "success_high": found.high, "trials": found.n}

    return drive
