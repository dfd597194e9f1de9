"""Serving: a policy behind a websocket, in openpi's protocol, and pages that show what it does."""

from manipi.serve.access import Access
from manipi.serve.batching import Limits
from manipi.serve.server import PolicyServer, ServablePolicy

__all__ = ["Access", "Limits", "PolicyServer", "ServablePolicy"]
