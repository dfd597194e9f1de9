"""The robot's side of a policy server: wire format, client, action-chunk brokers and runtime. No torch, no manipi.

Each name is imported when it is first used, because websockets take a while.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manipi_client.broker import ActionChunkBroker as ActionChunkBroker
    from manipi_client.broker import Policy as Policy
    from manipi_client.client import AsyncWebsocketPolicy as AsyncWebsocketPolicy
    from manipi_client.client import WebsocketPolicy as WebsocketPolicy
    from manipi_client.errors import AccessDenied as AccessDenied
    from manipi_client.errors import ActionChunkError as ActionChunkError
    from manipi_client.errors import ConnectError as ConnectError
    from manipi_client.errors import ConnectionLost as ConnectionLost
    from manipi_client.errors import ConnectTimeout as ConnectTimeout
    from manipi_client.errors import InferenceTimeout as InferenceTimeout
    from manipi_client.errors import InputError as InputError
    from manipi_client.errors import ManipiClientError as ManipiClientError
    from manipi_client.errors import PolicyChanged as PolicyChanged
    from manipi_client.errors import PolicyServerError as PolicyServerError
    from manipi_client.errors import ProtocolError as ProtocolError
    from manipi_client.errors import RemoteInferenceError as RemoteInferenceError
    from manipi_client.realtime import Motion as Motion
    from manipi_client.realtime import MotionMeter as MotionMeter
    from manipi_client.realtime import RealTimeBroker as RealTimeBroker
    from manipi_client.runtime import Agent as Agent
    from manipi_client.runtime import Environment as Environment
    from manipi_client.runtime import PolicyAgent as PolicyAgent
    from manipi_client.runtime import Runtime as Runtime
    from manipi_client.runtime import Subscriber as Subscriber

__version__ = "0.1.0"

_MODULES = {
    "broker": "ActionChunkBroker Policy",
    "client": "AsyncWebsocketPolicy WebsocketPolicy",
    "errors": (
        "AccessDenied ActionChunkError ConnectError ConnectTimeout ConnectionLost InferenceTimeout InputError "
        "ManipiClientError PolicyChanged PolicyServerError ProtocolError RemoteInferenceError"
    ),
    "realtime": "Motion MotionMeter RealTimeBroker",
    "runtime": "Agent Environment PolicyAgent Runtime Subscriber",
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = sorted(_PLACES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
