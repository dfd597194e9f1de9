"""The robot's side of a policy server: wire format, client, action-chunk brokers and runtime. No torch, no manipi.

The errors are here at once; everything else is imported at its first use, because websockets take a while.
"""

import importlib
from typing import TYPE_CHECKING, Any

from manipi_client.errors import (
    AccessDenied,
    ActionChunkError,
    ConnectError,
    ConnectionLost,
    ConnectTimeout,
    InferenceTimeout,
    InputError,
    ManipiClientError,
    PolicyChanged,
    PolicyServerError,
    ProtocolError,
    RemoteInferenceError,
)

if TYPE_CHECKING:
    from manipi_client.aio import AsyncWebsocketPolicy
    from manipi_client.broker import ActionChunkBroker, Policy
    from manipi_client.client import WebsocketPolicy
    from manipi_client.realtime import Motion, MotionMeter, RealTimeBroker
    from manipi_client.runtime import Agent, Environment, PolicyAgent, Runtime, Subscriber

__version__ = "0.1.0"

__all__ = [
    "AccessDenied",
    "ActionChunkBroker",
    "ActionChunkError",
    "Agent",
    "AsyncWebsocketPolicy",
    "ConnectError",
    "ConnectTimeout",
    "ConnectionLost",
    "Environment",
    "InferenceTimeout",
    "InputError",
    "ManipiClientError",
    "Motion",
    "MotionMeter",
    "Policy",
    "PolicyAgent",
    "PolicyChanged",
    "PolicyServerError",
    "ProtocolError",
    "RealTimeBroker",
    "RemoteInferenceError",
    "Runtime",
    "Subscriber",
    "WebsocketPolicy",
]

_MODULES = {
    **dict.fromkeys(("ActionChunkBroker", "Policy"), "broker"),
    "AsyncWebsocketPolicy": "aio",
    **dict.fromkeys(("Motion", "MotionMeter", "RealTimeBroker"), "realtime"),
    "WebsocketPolicy": "client",
    **dict.fromkeys(("Agent", "Environment", "PolicyAgent", "Runtime", "Subscriber"), "runtime"),
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
