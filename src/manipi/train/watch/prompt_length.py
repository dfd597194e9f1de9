"""The longest prompt of a run's data, found from the tables before the first step: no picture is read.

A prompt's length is that of its instruction, plus that of each number of the state, plus (π0-FAST) that of the actions:

    tokens of a row  =  length of its text with a state of zeros  +  Σ over dimensions, how much longer than "0" its bin

For tokenizers that split at spaces, which PaliGemma's and ours do, the sum is exact. It is compared with prompts that
are written out, the longest by the sum and others; where one differs, the prompt of every row is written out instead.

Shape letters: N rows, S state dimensions, H action horizon, A action dimensions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64
from tqdm import tqdm

from manipi.data.dataset import action_chunks
from manipi.data.feed.mixture import Part
from manipi.data.norm_stats.compute import read_state
from manipi.errors import ConfigError, shown
from manipi.tokenizers.actions import NUM_BINS, bin_indices
from manipi.transforms.actions import ActionSpace
from manipi.transforms.normalize import Normalize
from manipi.transforms.pipeline import Pipeline
from manipi.transforms.tokenize import TokenizeActions, TokenizePrompt, TokenizeStep

BLOCK = 1 << 14
"""Rows worked on at a time."""
PROBES = 64
"""Of each block, so many rows that seem the longest are written out, and as many others."""


@dataclass(frozen=True, kw_only=True)
class LongestPrompt:
    """The prompt of some data that takes most of the model's prompt tokens."""

    tokens: int
    of_actions: int
    """How many of them spell actions: π0-FAST alone has any."""
    limit: int
    """The model's `max_token_len`."""
    truncated: bool
    """Whether the model cuts what is too long (`Compat.truncated_prompts`)."""
    dataset: str
    place: str
    """Episode and frame."""
    instruction: str

    def __str__(self) -> str:
        actions = f", {self.of_actions} of them actions" if self.of_actions else ""
        cut = "; the rest is cut off" if self.tokens > self.limit else ""
        where = f"{self.dataset}, {self.place}, {shown(self.instruction)}"
        return f"longest prompt  {self.tokens} of {self.limit} tokens (max_token_len){actions}{cut}: {where}"

    def require_fit(self) -> None:
        """Raises ConfigError where the model has too few prompt tokens and does not cut."""
        if self.tokens > self.limit and not self.truncated:
            actions = f", {self.of_actions} of them actions" if self.of_actions else ""
            raise ConfigError(
                expected=f"prompts of at most {self.limit} tokens (max_token_len)",
                found=f"{self.tokens} tokens{actions}, with the instruction {shown(self.instruction)}",
                where=f"{self.dataset}, {self.place}, the longest of the data",
                next=f"--model.max-token-len {self.tokens}, in the recipe or as a flag; or shorten the instruction",
            )


def longest_prompt(parts: Sequence[Part]) -> LongestPrompt:
    """Of all rows of all parts, those held out too."""
    return max((_longest_of(part) for part in parts), key=lambda one: one.tokens - one.limit)


def _longest_of(part: Part) -> LongestPrompt:
    source, rows = part.source, np.sort(np.concatenate([part.rows, part.held_out]))
    dataset, step = source.dataset, _step(source.pipeline, TokenizePrompt, TokenizeActions)
    texts, numbers = dataset.instructions(source.prompt)
    states = _States(step, source.pipeline.robot.state_size)
    of_text = np.array([states.with_zeros(text) for text in texts])
    tokens, of_actions, row, text = 0, 0, 0, ""
    for block, state_NS, actions_N in _blocks(part, step, rows):
        candidates_Nk = of_text[numbers[block]]
        choice_N = candidates_Nk.argmax(axis=1)
        prompt_N = candidates_Nk.max(axis=1) + states.beyond_zeros(state_NS)

        def written(i: int) -> int:
            return step.prompt_length(texts[numbers[block[i], choice_N[i]]], state_NS[i])  # noqa: B023

        order = np.argsort(-(prompt_N + actions_N), kind="stable")
        probes = {*order[:PROBES].tolist(), *order[:: max(1, len(order) // PROBES)].tolist()}
        if any(written(i) != prompt_N[i] for i in probes):
            prompt_N = np.array([written(i) for i in range(len(block))])
        at = int((prompt_N + actions_N).argmax())
        if prompt_N[at] + actions_N[at] > tokens:
            tokens, of_actions = int(prompt_N[at] + actions_N[at]), int(actions_N[at])
            row, text = int(block[at]), texts[numbers[block[at], choice_N[at]]]
    return LongestPrompt(
        tokens=tokens,
        of_actions=of_actions,
        limit=step.max_len,
        truncated=step.compat.truncated_prompts,
        dataset=dataset.name,
        place=dataset.locate(row),
        instruction=text,
    )


def _blocks(
    part: Part, step: TokenizeStep, rows: Int64[np.ndarray, "N"]
) -> Iterator[tuple[np.ndarray, Float32[np.ndarray, "N S"], Int64[np.ndarray, "N"]]]:
    """Rows, their normalised states, and the tokens of their actions, as the pipeline makes them of frames."""
    source, robot = part.source, part.source.pipeline.robot
    normalize = _step(source.pipeline, Normalize)
    space, state_NS = ActionSpace(robot), read_state(source.dataset, robot)
    key, horizon = robot.dataset_key(robot.action_key), source.action_horizon
    blocks = [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]
    for block in tqdm(blocks, desc="prompts", unit="block", leave=False, delay=2, disable=None):
        sample = {"state": state_NS[block].astype(np.float32)}
        if isinstance(step, TokenizeActions):
            sample["actions"] = action_chunks(source.dataset, block, action_key=key, horizon=horizon)[0]
        sample = normalize.encode(space.encode(sample))
        of_actions = np.zeros(len(block), np.int64)
        if isinstance(step, TokenizeActions):
            of_actions = step.action_lengths(sample["actions"])
        yield block, sample["state"], of_actions


class _States:
    """How many tokens the numbers of a state take, by their bins."""

    def __init__(self, step: TokenizeStep, size: int):
        self._step, self._size = step, size if step.with_state else 0
        # A number's tokens depend on what stands beside it at the ends of the list alone.
        places = {0, min(1, self._size - 1), self._size - 1} if self._size else set()
        self._tables = {place: self._table(place) for place in places}

    def with_zeros(self, text: str) -> int:
        return self._step.prompt_length(text, _centres(np.zeros(self._size)))

    def beyond_zeros(self, state_NS: Float32[np.ndarray, "N S"]) -> Int64[np.ndarray, "N"]:
        """How many tokens more than one of zeros each state takes."""
        more_N = np.zeros(len(state_NS), np.int64)
        for d in range(self._size):
            table = self._tables[d if d in self._tables else 1]
            more_N += table[1 + bin_indices(state_NS[:, d], minus_one_below=True)]
        return more_N

    def _table(self, place: int) -> Int64[np.ndarray, "257"]:
        """For the bins from -1 on."""
        bins = np.zeros((NUM_BINS + 1, self._size))
        bins[:, place] = np.arange(-1, NUM_BINS)
        return np.array([self._step.prompt_length("", _centres(state)) for state in bins]) - self.with_zeros("")


def _centres(bins: np.ndarray) -> np.ndarray:
    return (bins + 0.5) / (NUM_BINS / 2) - 1


def _step(pipeline: Pipeline, *kinds: type) -> Any:
    return next(step for step in pipeline.steps if isinstance(step, kinds))
