"""Who may connect: the address that is listened on, the token that clients show, and TLS."""

import base64
import binascii
import errno
import hmac
import ipaddress
import os
import socket
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from websockets.datastructures import Headers

from manipi.errors import ServeError

TOKEN_VARIABLE = "MANIPI_TOKEN"


@dataclass(frozen=True, kw_only=True)
class Access:
    """Without a token every client that reaches the port may use it, so that the port has to be this computer's own."""

    token: str | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = None
    insecure: bool = False
    """Listen without a token where other computers can connect."""

    def admits(self, headers: Headers) -> bool:
        """Whether the request shows the token: `Api-Key TOKEN` as policy clients do, or as a browser's password."""
        if self.token is None:
            return True
        shown_ones = headers.get_all("Authorization")
        if len(shown_ones) != 1:  # of several, a proxy in front may have looked at another one
            return False
        scheme, _, shown = shown_ones[0].partition(" ")
        if scheme.lower() == "basic":
            try:
                shown = base64.b64decode(shown, validate=True).decode().partition(":")[2]
            except (binascii.Error, ValueError):
                shown = ""
        elif scheme.lower() != "api-key":
            shown = ""
        return hmac.compare_digest(shown.strip().encode(), self.token.encode())

    def resolve(self, host: str, port: int) -> tuple[socket.AddressFamily, tuple]:
        """Family and address of a host. Raises ServeError: unknown, or others reach it and there is no token."""
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        except OSError as error:
            expected = "a host name or address of this computer"
            raise _error(expected, str(error), join_host(host, port), "check --host") from error
        if not (_is_loopback(address[0]) or self.token or self.insecure):
            raise _error(
                "a token, or an address that only this computer reaches, such as 127.0.0.1",
                "an address that other computers reach, and no token",
                join_host(host, port),
                f"set --token-file or {TOKEN_VARIABLE}, connect through `ssh -L`, or let everyone in with --insecure",
            )
        return family, address

    def accepts_host(self, headers: Headers, host: str, address: tuple) -> bool:
        """Whether the request's Host header can belong to a server that listens on `host`, which is `address`.

        A page of another site may have its own name resolved to 127.0.0.1 (DNS rebinding), and its visitor's browser
        then takes the server for that site. Where neither the network nor a token keeps it out, the name has to.
        """
        names = headers.get_all("Host")
        if self.token is not None or not _is_loopback(address[0]):
            return len(names) <= 1
        try:
            hosts = [(urlsplit(f"//{name}").hostname or "").rstrip(".") for name in names]
        except ValueError:  # brackets without an address in them
            return False
        known = [name in ("localhost", host.lower()) or _is_loopback(name) for name in hosts]
        return len(names) <= 1 and all(known)  # a browser always sends one, HTTP/1.0 may send none


def read_token(file: Path | None) -> str | None:
    """The token in a file, or else in the environment variable MANIPI_TOKEN; None where there is neither.

    Raises:
        ServeError: the file cannot be read, or what is there is no token. The message does not hold it.
    """
    try:
        token = os.environ.get(TOKEN_VARIABLE) if file is None else file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise _error("a file with a token", type(error).__name__, str(file), "check --token-file") from error
    if token is None or (len(token) >= 8 and token.isascii() and token.isprintable() and " " not in token):
        return token
    found = f"{len(token)} characters" if len(token) < 8 else "spaces or other characters"
    next = "python -c 'import secrets; print(secrets.token_urlsafe())' > token; chmod 600 token"
    raise _error("a token: 8 printable ASCII characters or more", found, str(file or TOKEN_VARIABLE), next)


def tls_context(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """TLS with a certificate chain and its key, both PEM; None without them. Raises ServeError where they are none."""
    if certificate is None and key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        if certificate is None:
            raise FileNotFoundError("a key alone")
        context.load_cert_chain(certificate, key)
    except OSError as error:  # ssl.SSLError is one
        where = ", ".join(str(path) for path in (certificate, key) if path)
        alone = "" if key else "; without --tls-key, the key has to be in the certificate's file"
        next = f"check --tls-cert and --tls-key{alone}"
        raise _error("a certificate and its key, as PEM files", str(error), where, next) from error
    return context


def bind(family: socket.AddressFamily, address: tuple) -> socket.socket:
    """A listening socket. Raises ServeError where the port is in use or the address is not this computer's."""
    host, port = address[:2]
    both = host == "::" and socket.has_dualstack_ipv6()  # "::" is every address of this computer, also those of IPv4
    try:
        return socket.create_server((host, port), family=family, dualstack_ipv6=both)
    except OSError as error:
        where = join_host(host, port)
        if error.errno == errno.EADDRINUSE:
            next = f"stop what listens there, or choose another port: --port {port + 1} (0 picks a free one)"
            raise _error("a free port", "a port that is in use", where, next) from error
        raise _error("an address to listen on", str(error), where, "choose another --host or --port") from error


def join_host(host: str, port: int) -> str:
    """`host:port` of a URL, where an IPv6 address has brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_loopback(name: object) -> bool:
    try:
        return ipaddress.ip_address(str(name).split("%")[0]).is_loopback
    except ValueError:
        return False


def _error(expected: str, found: str, where: str, next: str) -> ServeError:
    return ServeError(expected=expected, found=found, where=where, next=next)
