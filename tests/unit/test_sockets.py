import socket

import pytest

from mesh.view import Address
from nodes.config import ConfigInvalid
from nodes.sockets import bind_http, bind_mesh, bound_address


def test_udp_and_tcp_of_the_mesh_share_a_number() -> None:
    udp, tcp = bind_mesh(Address("127.0.0.1", 0))
    with udp, tcp:
        assert udp.getsockname() == tcp.getsockname()
        assert bound_address(Address("127.0.0.1", 0), tcp) == Address(*udp.getsockname())


def test_a_mesh_port_taken_for_udp_alone_is_refused() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ConfigInvalid, match="in use"):
            bind_mesh(Address(*taken.getsockname()))


def test_a_name_that_does_not_resolve_is_named() -> None:
    with pytest.raises(ConfigInvalid, match=r"--http no-such-host\.invalid:80"):
        bind_http(Address("no-such-host.invalid", 80))


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigInvalid, match="cannot bind"):
        bind_http(Address("192.0.2.1", 0))


def test_small_chunks_are_sent_at_once() -> None:
    with bind_http(Address("127.0.0.1", 0)) as listener:
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
