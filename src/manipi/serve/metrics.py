"""What the server counts and times, and the text in which Prometheus reads it."""

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

STAGES = ("read", "wait", "infer", "write", "total")
"""From the last byte of an observation to its answer in the socket:

    read    bytes to arrays
    wait    for the thread that computes, and for others of the batch
    infer   policy and action guard, of the whole batch
    write   arrays to bytes
    total   all of these, until the answer is in the socket
"""

QUANTILES = (0.5, 0.95, 0.99)


@dataclass
class Latency:
    """Durations of one stage, in seconds: sum and count of all, quantiles of the last 1,000."""

    recent: deque[float] = field(default_factory=lambda: deque(maxlen=1_000))
    total_s: float = 0.0
    count: int = 0

    def add(self, seconds: float) -> None:
        self.recent.append(seconds)
        self.total_s += seconds
        self.count += 1

    def quantiles_s(self) -> list[float]:
        """p50, p95, p99 in seconds; empty before the first."""
        return np.quantile(self.recent, QUANTILES).tolist() if self.recent else []


@dataclass
class Metrics:
    """Since the server started."""

    observations: int = 0
    answers: int = 0
    batches: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    """By code."""
    guarded: Counter[str] = field(default_factory=Counter)
    """Numbers of action chunks that the guard moved, by reason."""
    stages: Mapping[str, Latency] = field(default_factory=lambda: {stage: Latency() for stage in STAGES})

    def to_prometheus(self, gauges: Mapping[str, float]) -> str:
        """The text format, version 0.0.4. `gauges` are what the server has now."""
        families = [
            _family("observations_total", "counter", "Observations received.", [("", "", self.observations)]),
            _family("answers_total", "counter", "Action chunks sent.", [("", "", self.answers)]),
            _family("batches_total", "counter", "Batches computed.", [("", "", self.batches)]),
            _family("errors_total", "counter", "Errors sent, by code.", _labelled("code", self.errors)),
            _family("guarded_total", "counter", "Commands that the guard moved.", _labelled("reason", self.guarded)),
            *(_family(name, "gauge", f"{name} now.".capitalize(), [("", "", n)]) for name, n in gauges.items()),
            _family("latency_seconds", "summary", "Time by stage; quantiles of the last 1,000.", self._summary()),
        ]
        return "".join(families)

    def _summary(self) -> list[tuple[str, str, float]]:
        samples: list[tuple[str, str, float]] = []
        for stage, latency in self.stages.items():
            for quantile, seconds in zip(QUANTILES, latency.quantiles_s()):
                samples.append(("", f'{{stage="{stage}",quantile="{quantile}"}}', seconds))
            label = f'{{stage="{stage}"}}'
            samples += [("_sum", label, latency.total_s), ("_count", label, latency.count)]
        return samples


def _labelled(label: str, counts: Mapping[str, int]) -> list[tuple[str, str, float]]:
    return [("", f'{{{label}="{value}"}}', count) for value, count in sorted(counts.items())]


def _family(name: str, kind: str, help: str, samples: Iterable[tuple[str, str, float]]) -> str:
    """One metric; a sample is a suffix of its name, its labels and its value."""
    lines = [f"manipi_{name}{suffix}{labels} {value:.10g}\n" for suffix, labels, value in samples]
    return f"# HELP manipi_{name} {help}\n# TYPE manipi_{name} {kind}\n{''.join(lines)}"
