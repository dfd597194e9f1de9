import pytest


@pytest.fixture
def measure():
    """`measure(quantity, error, tolerance)` fails beyond the tolerance."""

    def measure(quantity: str, error: float, tolerance: float) -> None:
        assert error <= tolerance, f"{quantity}: largest error {error:.3g}, tolerance {tolerance:.3g}"

    return measure
