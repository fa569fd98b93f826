"""The two addresses of a node, bound before anything else starts, so that a port in use ends it at once."""

from __future__ import annotations

import errno
import ipaddress
import socket
from dataclasses import dataclass
from typing import Any

from mesh.view import Address
from nodes.config import ConfigInvalid, NodeConfig

HTTP_BACKLOG = 1024
# UDP and TCP must share a free number; with port 0 the kernel picks for TCP, and UDP may find it taken.
MESH_PORT_TRIES = 16
HTTP_FLAG = "--http"
MESH_FLAG = "--mesh"


@dataclass(frozen=True, slots=True)
class NodeSockets:
    """Bound by run_node, which also closes them."""

    http: socket.socket
    mesh_udp: socket.socket
    mesh_tcp: socket.socket


def bind_http(address: Address) -> socket.socket:
    """A listening socket. Raises ConfigInvalid that names the address and the fix."""
    listener = _bind(address, socket.SOCK_STREAM, HTTP_FLAG)
    # Accepted sockets inherit it; without it the kernel holds back the second small chunk of a stream.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.listen(HTTP_BACKLOG)
    return listener


def bind_mesh(address: Address) -> tuple[socket.socket, socket.socket]:
    """(UDP, TCP listening) on one port number. Raises ConfigInvalid that names the address and the fix."""
    for tries_left in reversed(range(MESH_PORT_TRIES)):
        tcp = _bind(address, socket.SOCK_STREAM, MESH_FLAG)
        bound = Address(address.host, tcp.getsockname()[1])
        try:
            udp = _bind(bound, socket.SOCK_DGRAM, MESH_FLAG)
        except ConfigInvalid:
            tcp.close()
            if address.port != 0 or tries_left == 0:
                raise
            continue
        tcp.listen(HTTP_BACKLOG)
        return udp, tcp
    raise AssertionError("unreachable")


def check_distinct(config: NodeConfig) -> None:
    """Raises ConfigInvalid where both addresses are fixed and one port, or one of them has no such host."""
    (_, http), (_, mesh) = _resolve(config.http, HTTP_FLAG), _resolve(config.mesh, MESH_FLAG)
    if config.http.port == config.mesh.port != 0 and _overlap(http[0], mesh[0]):
        raise ConfigInvalid(
            f"{HTTP_FLAG} {config.http} and {MESH_FLAG} {config.mesh} are the same port; give each a port of its own"
        )


def check_bindable(config: NodeConfig) -> None:
    """Raises ConfigInvalid where a host has no such name or is not this machine's, or both ports are one.

    Free ports of the hosts are bound for it and given back at once, so a node that has its own may be running."""
    check_distinct(config)
    _bind(config.http, socket.SOCK_STREAM, HTTP_FLAG, is_trial=True).close()
    _bind(config.mesh, socket.SOCK_STREAM, MESH_FLAG, is_trial=True).close()


def bound_address(configured: Address, bound: socket.socket) -> Address:
    """The configured host with the port that was really bound."""
    return Address(configured.host, bound.getsockname()[1])


def advertised_address(config: NodeConfig, bound: Address) -> Address:
    """Where other nodes reach the mesh port, as an IP address: what is configured, else what is bound.

    A node bound to all addresses takes the one from which it reaches a seed. Raises ConfigInvalid where there is none,
    or its own name does not resolve.
    """
    address = _numeric(config.advertise or bound, "--advertise" if config.advertise else MESH_FLAG)
    if not ipaddress.ip_address(address.host).is_unspecified:
        return address
    for seed in config.join:
        try:
            family, kind, _, _, target = socket.getaddrinfo(seed.host, seed.port, type=socket.SOCK_DGRAM)[0]
        except (socket.gaierror, UnicodeError):
            continue  # the name may come; gossip looks it up each time it calls the seed
        with socket.socket(family, kind) as probe:
            try:
                probe.connect(target)  # sends nothing; it only chooses the way
            except OSError:
                continue
            return Address(probe.getsockname()[0], address.port)
    raise ConfigInvalid(
        f"--mesh {bound} binds all addresses, and other nodes cannot reach that; "
        "say which is this machine's with --advertise HOST:PORT"
    )


def _numeric(address: Address, flag: str) -> Address:
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_DGRAM)
    except (socket.gaierror, UnicodeError) as exc:
        raise _unresolved(address, flag, exc) from exc
    return Address(str(found[0][4][0]), address.port)


def _resolve(address: Address, flag: str) -> tuple[socket.AddressFamily, tuple[Any, ...]]:
    """What to bind. Raises ConfigInvalid."""
    try:
        family, _, _, _, target = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as exc:
        raise _unresolved(address, flag, exc) from exc
    return family, target


def _unresolved(address: Address, flag: str, fault: socket.gaierror | UnicodeError) -> ConfigInvalid:
    """A UnicodeError: a name that no lookup takes, such as `a..b`."""
    reason = fault.strerror if isinstance(fault, OSError) else "it can be no host name"
    return ConfigInvalid(f"{flag} {address}: the host name does not resolve ({reason})")


def _overlap(host: str, other: str) -> bool:
    """Whether one port of the two IP addresses cannot be bound twice. All of IPv6 takes in all of IPv4."""
    first, second = ipaddress.ip_address(host.partition("%")[0]), ipaddress.ip_address(other.partition("%")[0])
    if first == second:
        return True
    return any(
        one.is_unspecified and (one.version == 6 or another.version == 4)
        for one, another in ((first, second), (second, first))
    )


def _bind(address: Address, kind: socket.SocketKind, flag: str, *, is_trial: bool = False) -> socket.socket:
    """is_trial: a free port instead of the address's own."""
    family, target = _resolve(address, flag)
    if is_trial:
        target = (target[0], 0, *target[2:])
    bound = socket.socket(family, kind)
    try:
        if kind is socket.SOCK_STREAM:
            # A restarted node takes its port back although old connections linger in TIME_WAIT.
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(target)
    except OSError as exc:
        bound.close()
        if exc.errno == errno.EADDRINUSE:
            raise ConfigInvalid(
                f"{flag} {address}: the port is in use by another process; stop it or give another HOST:PORT"
            ) from exc
        raise ConfigInvalid(f"{flag} {address}: cannot bind it ({exc.strerror}); give another HOST:PORT") from exc
    bound.setblocking(False)
    return bound
