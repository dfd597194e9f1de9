"""Which server: its address as a user writes it down, TLS, and whether it still serves the same policy.

A server that was connected again is compared by what it says about itself:

    robot, action_space, action_dim, control_hz     have to be the same, always
    everything else (checkpoint, model, step, …)    has to be the same, unless another checkpoint is allowed

openpi's server says whatever its operator gave it; that is compared in the same way.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import ssl
from os import PathLike
from typing import Any, List, Mapping
from urllib.parse import urlsplit

from manipi_client import wire
from manipi_client.errors import ConnectError, PolicyChanged, one_line, shown

_SCHEMES = {"ws": "ws", "wss": "wss", "http": "ws", "https": "wss"}

_LOOK_SECONDS = 2.0

# OpenSSL's numbers for a certificate whose signer is not known, and for one of another name.
_UNKNOWN_SIGNER, _OTHER_NAME = (18, 19, 20, 21), (62, 64)

_OF_THE_ROBOT = ("robot", "action_space", "action_dim", "control_hz")

_OF_TRAINING = ("default_prompt", "dataset_keys")
"""What a robot's description says of data and recipe; another checkpoint of the same robot may have another."""

_SHOWN, _DEEPEST = 4, 8

_NONE = object()
"""Stands for a key that metadata lack."""


def read_address(host: str, port: int | None, *, secure: bool = False) -> str:
    """The URI of an address as people write it: a name, an IP address, either with a port, or a whole URI.

        robot   robot:8000   192.168.1.20:8000   ::1   [::1]:8000   ws://robot:8000/path   wss://robot   https://robot

    Args:
        port: where the address has none; None: the scheme's own.
        secure: without a scheme it is `wss` and not `ws`.

    Raises:
        ConnectError: it is no such address.
    """
    try:
        if not isinstance(host, str):
            raise ValueError("no text")
        scheme, separator, rest = host.strip().rpartition("://")
        scheme = _SCHEMES[scheme.lower()] if separator else "wss" if secure else "ws"
        if not separator:
            with contextlib.suppress(ValueError):  # it is no bare IP address
                rest = f"[{rest}]" if ipaddress.ip_address(rest.partition("%")[0]).version == 6 else rest
        parts = urlsplit(f"{scheme}://{rest}")
        if port is not None and parts.port is None:
            parts = parts._replace(netloc=f"{parts.netloc.rstrip(':')}:{port}")
        if not parts.hostname or parts.port == 0 or parts.fragment or any(c.isspace() for c in parts.netloc):
            raise ValueError("no host, or no port")
        parts.hostname.encode("idna")  # as the connection will
    except (ValueError, KeyError) as error:
        raise ConnectError(
            expected="an address: robot, robot:8000, 192.168.1.20:8000, [::1]:8000, ws://robot:8000 or wss://robot:8000",
            found=shown(host) + ("" if port in (None, 8000) else f", port {shown(port)}"),
            where="the policy server's address",
            next="write host and port as one of these; a port is a number from 1 to 65535",
        ) from error
    return parts.geturl()


def without_password(uri: str) -> str:
    """The URI for texts and logs. Before an `@` in it may stand the token, which servers take as a password."""
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def tls_context(ca: str | PathLike[str] | None, uri: str) -> ssl.SSLContext | None:
    """TLS that trusts the certificates in a PEM file and no others; None without a file: whom this computer trusts.

    Raises:
        ConnectError: the file cannot be read or holds no certificate, or the address is one without TLS.
    """
    if ca is None:
        return None
    try:
        context = ssl.create_default_context(cafile=ca)
    except (OSError, TypeError) as error:  # ssl.SSLError is an OSError
        raise ConnectError(
            expected="a file with certificates (PEM), the server's own or of who signed it",
            found=one_line(str(error), 200),
            where=f"ca={shown(str(ca))}",
            next="copy the file that the server was started with: manipi serve --tls-cert",
        ) from error
    if not uri.startswith("wss:"):
        raise ConnectError(
            expected="an address with TLS where certificates are given (ca)",
            found=shown(uri),
            where="the policy server's address",
            next="write wss:// instead of ws://, or leave ca out",
        )
    return context


def certificate_advice(error: ssl.SSLCertVerificationError, ca: object) -> str:
    """What to do about a certificate that did not pass."""
    if error.verify_code in _UNKNOWN_SIGNER:
        if ca is not None:
            return "ca is another server's certificate: copy the one that this server was started with (--tls-cert)"
        return "give the server's certificate, or that of who signed it: ca=FILE (manipi replay --ca FILE)"
    if error.verify_code in _OTHER_NAME:
        return "connect by a name that the certificate has, or make one whose subjectAltName has this address"
    return "renew the server's certificate, or look at the clocks of both computers"


def open_socket(uri: str, seconds: float) -> socket.socket:
    """A connection to the URI's host and port. Raises OSError, TimeoutError after at most two seconds.

    A computer that is switched off answers nothing at all: who waits for it tries again, and may stop in between.
    """
    parts = urlsplit(uri)
    port = parts.port or (443 if parts.scheme == "wss" else 80)
    connection = socket.create_connection((parts.hostname or "", port), max(0.01, min(seconds, _LOOK_SECONDS)))
    connection.settimeout(None)
    return connection


def other_scheme(uri: str, seconds: float) -> str | None:
    """The same address with TLS where it speaks TLS and the URI does not say so, and the other way round; else None.

    Looks once, for at most two seconds. Nothing secret is sent.
    """
    parts = urlsplit(uri)
    secure = parts.scheme == "wss"
    try:
        with open_socket(uri, seconds) as connection:
            connection.settimeout(max(0.01, min(seconds, _LOOK_SECONDS)))
            if secure:
                connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                return parts._replace(scheme="ws").geturl() if connection.recv(5) == b"HTTP/" else None
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # the question is only whether
            with context.wrap_socket(connection, server_hostname=parts.hostname):
                return parts._replace(scheme="wss").geturl()
    except OSError:  # ssl.SSLError and timeouts are; what answers speaks neither
        return None


# The same policy again ------------------------------------------------------------------------------------------------


def require_same(before: Mapping[str, Any], now: Mapping[str, Any], uri: str, *, allow_new_checkpoint: bool) -> None:
    """Compares two servers' metadata. Raises PolicyChanged, which names what is different."""
    if robot := differences(_robot(before), _robot(now)):
        raise policy_changed(robot, uri, robot=True)
    if not allow_new_checkpoint and (checkpoint := differences(before, now)):
        raise policy_changed(checkpoint, uri, robot=False)


def policy_changed(changes: List[str], uri: str, *, robot: bool) -> PolicyChanged:
    """The error for these differences, of the robot or of the checkpoint alone."""
    next = (
        "serve the former checkpoint; allow_new_checkpoint=True lets a client go on with another one of the same robot"
    )
    if robot:
        next = "start the server of this robot again; a run with another robot needs a new client"
    more = f"; and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
    return PolicyChanged(
        expected=f"the {'robot' if robot else 'policy'} that this client began with",
        found=f"another {'robot or action space' if robot else 'policy'}: {'; '.join(changes[:_SHOWN])}{more}",
        where=f"{uri}, connected again",
        next=next,
    )


def differences(before: Any, now: Any, name: str = "", depth: int = 0) -> List[str]:
    """What is different in two values of metadata, each as a short text with the name of the key."""
    if depth < _DEEPEST and isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = [*before, *(key for key in now if key not in before)]
        labels = [one_line(f"{name}.{key}" if name else str(key), 80) for key in keys]
        inner = [(label, before.get(key, _NONE), now.get(key, _NONE)) for label, key in zip(labels, keys)]
    elif depth < _DEEPEST and isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        inner = [(f"{name}[{i}]", one, other) for i, (one, other) in enumerate(zip(before, now))]
    elif before is not _NONE and now is not _NONE and wire.pack(before) == wire.pack(now):
        inner = []
    else:
        is_now, was = ("not told" if value is _NONE else shown(value) for value in (now, before))
        return [f"{name} is {is_now}, was {was}"]
    return [text for label, one, other in inner for text in differences(one, other, label, depth + 1)]


def _robot(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    told = {key: metadata[key] for key in _OF_THE_ROBOT if key in metadata}
    if isinstance(told.get("robot"), Mapping):
        told["robot"] = {key: value for key, value in told["robot"].items() if key not in _OF_TRAINING}
    return told
