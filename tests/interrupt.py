import signal

import pytest


@pytest.fixture
def interruptible():
    """Ctrl-C as in a terminal: jobs in the background of a shell are started deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
