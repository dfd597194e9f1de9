"""Serving: a policy behind a websocket, in openpi's protocol."""

from manipi.serve.server import PolicyServer, ServablePolicy

__all__ = ["PolicyServer", "ServablePolicy"]
