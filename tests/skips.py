"""What may be skipped where continuous integration runs all tests, and how often: a test that skips unseen is no test.

With CI=true in the environment a run of the whole suite fails where a reason is not in the table, or has another count.
Elsewhere nothing is pinned: a machine without `../shared`, browser or optional packages skips more.
"""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Skips:
    """Tests that are skipped for one reason."""

    reason: str
    """How the reason begins."""
    count: int = 0
    """Of them that hang on the machine: all of them are skipped, or none."""
    needs: str = ""
    """What `.ci/run` installs for them: none is skipped, but where MANIPI_CI_WITHOUT says that it could not."""


EXPECTED = (
    Skips("needs a GPU", 5),
    Skips("needs two GPUs", 1),
    Skips("this processor computes in bfloat16", 3),
    Skips("this computer has no IPv6", 3),
    Skips("no browser", needs="chromium"),
    Skips("needs manipi[low-bit]"),
    Skips("needs manipi[ray]"),
    Skips("needs manipi[view]"),
    Skips("openpi_client."),
    Skips("needs manipi[wandb]"),
    # openpi has no release, and lerobot wants other versions of our packages: `make test-lerobot` has its environment.
    Skips("openpi.serving.websocket_policy_server", 1),
    Skips("openpi.models_pytorch.pi0_pytorch", 2),
    Skips("lerobot.policies.factory", 13),
    Skips("set MANIPI_LEROBOT_PYTHON", 2),
    # Simulators are large, and their tests run where somebody has built them.
    Skips("make sim-metaworld", 3),
    Skips("make sim-libero", 2),
    Skips("make sim-aloha", 2),
)


def complaints(found: Mapping[str, int], without: str, expected: tuple[Skips, ...] = EXPECTED) -> list[str]:
    """What differs from the table. `found`: how often each reason was given; `without`: MANIPI_CI_WITHOUT."""
    said = []
    for skips in expected:
        count = sum(n for reason, n in found.items() if reason.startswith(skips.reason))
        if skips.needs not in without.split() and count not in (0, skips.count):
            said.append(f"{count} skipped, where {skips.count or 'none'} may be: {skips.reason}")
    unknown = {r: n for r, n in found.items() if not any(r.startswith(skips.reason) for skips in expected)}
    return said + [
        f"{count} skipped for a reason that is not in the table: {reason}" for reason, count in unknown.items()
    ]


def _skipped(config: pytest.Config) -> Counter[str]:
    """How often each reason was given. Where there are no shared data, skips that name them count nothing."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    reasons = [report.longrepr[2].removeprefix("Skipped: ") for report in reporter.stats.get("skipped", ())]
    shared = Path(os.environ.get("MANIPI_SHARED", Path(__file__).parents[1] / "../shared")).is_dir()
    return Counter(reason for reason in reasons if shared or "MANIPI_SHARED" not in reason)


def _is_pinned(config: pytest.Config) -> bool:
    """Whether this is continuous integration, and all tests ran; the processes of pytest-xdist report to another."""
    asked = config.option.keyword or config.option.markexpr or config.getoption("--long", False)
    whole = config.args_source is not pytest.Config.ArgsSource.ARGS and not asked
    return os.environ.get("CI") == "true" and whole and config.pluginmanager.has_plugin("terminalreporter")


def _complaints(config: pytest.Config) -> list[str]:
    return complaints(_skipped(config), os.environ.get("MANIPI_CI_WITHOUT", ""))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if not exitstatus and _is_pinned(session.config) and _complaints(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if _is_pinned(config):
        found, said = _skipped(config), _complaints(config)
        terminalreporter.section("skips that tests/skips.py does not have" if said else "skips, as in tests/skips.py")
        for line in said or [f"{count:3} {reason}" for reason, count in sorted(found.items())]:
            terminalreporter.line(line)
