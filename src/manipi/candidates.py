"""Several action chunks for one observation, of which one is executed; and what chooses it.

    observation ──▶ prefix, once ──┬─▶ noise 0 ─▶ chunk 0 ─┐
                                   ├─▶ noise 1 ─▶ chunk 1 ─┼─▶ selector: a score each ──▶ the chunk with the highest
                                   └─▶ noise 2 ─▶ chunk 2 ─┘

Candidate 0 comes from the noise that a single chunk would come from, and candidate k's noise is a function of that one
and k. So candidates do not depend on their number, and no other answer of an episode changes with it.

A *gate* saves the others where the first is certain. A flow whose end is certain is a straight line, and how much its
path bends costs two norms per step (`manipi.model.flow.bend`, arXiv 2607.27933).

A selector may be a function or a class of yours, `FILE.py:NAME` (`Selector`). Behind any but `token`, `+token` puts
what the token head writes in the place of the last candidate: `limits+token`.

What a candidate's own FAST spelling is worth to the token head is no selector here: a difference of 0.2 % of the range
rewrites half of a chunk's codes, so that rounding decides.

Shape letters: N candidates, H action horizon, A action dimensions (of the robot, or of the model), S state dimensions.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float

from manipi.errors import ActionError, ManipiError, shown, unknown_name
from manipi.robots.robot import Gripper, LinkageGripper, Robot
from manipi.transforms.actions import CommandLimits, differs
from manipi.transforms.observation import MAX_CANDIDATES
from manipi.types import Observation


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """What a selector chooses from."""

    observation: Observation
    """In the robot's keys."""
    robot: Robot
    state: Float[np.ndarray, "S"]
    """The robot's own, of the observation."""
    actions: Float[np.ndarray, "N H A"]
    """Commands in the robot's units."""
    normalised: Float[np.ndarray, "N H A"]
    """The same as the model predicts them: all dimensions of one size, relative where the robot says so."""
    executed: slice
    """Rows that will be executed, as far as the client says so; without those that are given by a previous chunk."""
    previous: Float[np.ndarray, "n A"] | None = None
    """What is left of the chunk that the robot is executing, normalised; row i belongs to row i of each candidate."""
    proposal: Float[np.ndarray, "H A"] | None = None
    """What the token head writes, normalised; only for the selector `token`, and where it is the last candidate."""

    @cached_property
    def distances(self) -> Float[np.ndarray, "N N"]:
        """Between every two: root mean square over executed rows and all dimensions, normalised."""
        rows = self.normalised[:, self.executed].astype(np.float64)
        return _rms(rows[:, None] - rows[None])

    @property
    def spread(self) -> float:
        """The mean distance between two different candidates."""
        n = len(self.normalised)
        return float(self.distances.sum() / max(n * (n - 1), 1))


class Selector(Protocol):
    """Scores [N], the higher the better. Equal ones are decided for the first candidate."""

    def __call__(self, candidates: Candidates) -> Float[np.ndarray, "N"]: ...


def limits(candidates: Candidates) -> np.ndarray:
    """Fewest commands that the robot's limits and rates would move, of these the least jerk without grippers."""
    robot, rows = candidates.robot, candidates.executed
    wanted = candidates.actions[:, : rows.stop].astype(np.float64)
    limited, allowed = CommandLimits(robot).allowed(wanted, candidates.state)
    moved = (differs(wanted, limited) | differs(limited, allowed))[:, rows].sum((1, 2))
    grip = [isinstance(group, Gripper | LinkageGripper) for group in robot.actions for _ in range(group.model_size)]
    jerk = np.abs(np.diff(candidates.normalised[:, rows][..., ~np.array(grip)], 3, axis=1)).sum((1, 2))
    return -(moved + jerk / (1 + jerk))


def medoid(candidates: Candidates) -> np.ndarray:
    """The one that is nearest to all others."""
    return -candidates.distances.sum(1)


def coherence(candidates: Candidates) -> np.ndarray:
    """Nearest to what is left of the previous chunk (Liu et al. 2024, arXiv 2408.17355, backward); else all alike."""
    left = candidates.previous
    if left is None or len(left) <= candidates.executed.start:
        return np.zeros(len(candidates.actions))
    rows = slice(candidates.executed.start, len(left))
    return -_rms(candidates.normalised[:, rows] - left[rows])


def token(candidates: Candidates) -> np.ndarray:
    """Nearest to what the token head writes."""
    assert candidates.proposal is not None, "the policy has it decoded"
    rows = candidates.executed
    return -_rms(candidates.normalised[:, rows] - candidates.proposal[rows])


def _rms(difference: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(difference).mean((-2, -1)))


WITH_PROPOSAL = "+token"
"""Behind a selector's name: the last candidate is what the token head writes."""
SELECTORS: dict[str, Selector] = {one.__name__: one for one in (limits, medoid, coherence, token)}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How an answer is chosen. Requests with equal ones are computed together."""

    n: int = 1
    """Candidates; 1 is a policy as it always was."""
    selector: str = "medoid"
    gate: float | None = None
    """Only where the path of the first bends by more; None: always."""
    execute_steps: int | None = None
    """Steps of a chunk that will be executed; None: all."""

    @property
    def rule(self) -> str:
        """The selector's name alone."""
        return self.selector.removesuffix(WITH_PROPOSAL)

    @property
    def proposes(self) -> bool:
        """Whether the last candidate is what the token head writes."""
        return self.rule != self.selector

    def check(
        self, selectors: Mapping[str, Selector], *, flow: bool, tokens: bool, num_steps: int, error: type[ManipiError]
    ) -> None:
        """Raises `error` where a policy cannot choose so, UnknownNameError for an unknown selector.

        Args:
            flow, tokens: which heads the policy has.
        """
        if self.rule not in selectors:
            raise unknown_name("selector", self.rule, selectors, next="name one of them")
        fewest = 3 if self.rule == "medoid" else 1
        expected = ""
        if not 1 <= self.n <= MAX_CANDIDATES or 1 < self.n < fewest:
            expected = f"1 candidate, or from {max(2, fewest)} to {MAX_CANDIDATES} for {self.selector}"
        elif self.n > 1 and not flow:
            expected = "1 candidate of a policy that has no flow head"
        elif self.n > 1 and (self.proposes or self.rule == "token") and not tokens:
            expected = "a selector that needs no token head, which this policy has not"
        elif self.proposes and self.rule == "token":
            expected = "another selector beside the proposal, which is the nearest one to itself"
        elif self.gate is not None and not (0 <= self.gate < np.inf and num_steps >= 2):
            expected = "a gate from 0, and 2 integration steps or more, between which a path can bend"
        if expected:
            found = f"{self.n} candidates, selector {shown(self.selector)}, gate {self.gate}, {num_steps} steps"
            raise error(
                expected=expected,
                found=found,
                where="the choice among candidates",
                next="change --candidates, --selector or --gate, or the client's keys of these names",
            )


def candidate_noises(noise_HA: np.ndarray, n: int) -> np.ndarray:
    """Standard normal noise [N, H, A], the given one first; each of the others is a function of it and its index."""
    from manipi_client.lockstep import derive  # websockets come with it, which training does without

    seed = hashlib.sha256(noise_HA.tobytes()).hexdigest()
    generator, noises = torch.Generator(), torch.empty(n, *noise_HA.shape)
    noises[0] = torch.from_numpy(noise_HA)
    for k in range(1, n):
        noises[k].normal_(generator=generator.manual_seed(derive(seed, k)))
    return noises.numpy()


def executed_rows(horizon: int, given: int, execute_steps: int | None) -> slice:
    """Those behind the first `given`; always one at least."""
    start = min(given, horizon - 1)
    return slice(start, horizon if execute_steps is None else min(start + execute_steps, horizon))


def choose(name: str, selector: Callable[[Candidates], Any], candidates: Candidates) -> tuple[int, dict[str, Any]]:
    """The index of the best candidate, the first of equals; and what the answer says of it.

    Raises:
        ActionError: what the selector returns are not N scores without NaN; it is named.
    """
    n, given = len(candidates.actions), selector(candidates)
    try:
        scores = np.asarray(given, np.float64)
    except (TypeError, ValueError):
        scores = np.full(0, np.nan)
    if scores.shape != (n,) or np.isnan(scores).any():
        raise ActionError(
            expected=f"{n} numbers, a score for each candidate",
            found=shown(given, 200),
            where=f"the selector {shown(name)}",
            next="correct it: it takes manipi.candidates.Candidates, and returns [N], the higher the better",
        )
    top = scores.max()
    best = int((scores >= top - 1e-9 * abs(top) if np.isfinite(top) else scores == top).argmax())  # but for rounding
    return best, {"n": n, "chosen": best, "selector": name, "spread": candidates.spread, "scores": scores.tolist()}
