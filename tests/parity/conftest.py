"""Records how far every quantity is from the reference, and prints the table when the tests are done."""

from collections import defaultdict

import pytest

COLUMNS = ("quantity", "cases", "largest error", "tolerance", "used")


@pytest.fixture
def measure(record_property):
    """`measure(quantity, error, tolerance)` adds a row's value to the table and fails beyond the tolerance."""

    def measure(quantity: str, error: float, tolerance: float) -> None:
        # Properties travel with the test's report, also from the processes of pytest-xdist.
        record_property("parity", (quantity, float(error), float(tolerance)))
        assert error <= tolerance, f"{quantity}: largest error {error:.3g}, tolerance {tolerance:.3g}"

    return measure


def pytest_terminal_summary(terminalreporter):
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    measured = [value for report in reports for name, value in report.user_properties if name == "parity"]
    by_quantity = defaultdict(list)
    for quantity, error, tolerance in measured:
        by_quantity[quantity].append((_share(error, tolerance), error, tolerance))
    if by_quantity:
        terminalreporter.section("parity with the reference")
        rows = [COLUMNS, *(_row(quantity, values) for quantity, values in by_quantity.items())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for first, *rest in rows:
            cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
            terminalreporter.line("   ".join(cells), red="OUTSIDE" in rest)


def _share(error: float, tolerance: float) -> float:
    return error / tolerance if tolerance else (float("inf") if error else 0.0)


def _row(quantity: str, values: list[tuple[float, float, float]]) -> tuple[str, ...]:
    share, error, tolerance = max(values)
    used = "OUTSIDE" if share > 1 else f"{share:.0%}"
    return quantity, str(len(values)), f"{error:.2g}", f"{tolerance:.2g}" if tolerance else "exact", used
