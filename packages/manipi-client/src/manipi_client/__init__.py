"""The robot's side of a policy server: wire format, client, action-chunk broker and runtime. No torch, no manipi."""

from manipi_client.broker import ActionChunkBroker
from manipi_client.client import WebsocketPolicy
from manipi_client.errors import (
    ActionChunkError,
    ConnectError,
    ConnectionLost,
    ConnectTimeout,
    InferenceTimeout,
    InputError,
    ManipiClientError,
    PolicyServerError,
    ProtocolError,
    RemoteInferenceError,
)
from manipi_client.policy import Policy
from manipi_client.runtime import Agent, Environment, PolicyAgent, Runtime, Subscriber

__version__ = "0.1.0"

__all__ = [
    "ActionChunkBroker",
    "ActionChunkError",
    "Agent",
    "ConnectError",
    "ConnectTimeout",
    "ConnectionLost",
    "Environment",
    "InferenceTimeout",
    "InputError",
    "ManipiClientError",
    "Policy",
    "PolicyAgent",
    "PolicyServerError",
    "ProtocolError",
    "RemoteInferenceError",
    "Runtime",
    "Subscriber",
    "WebsocketPolicy",
]
