"""Where nodes meet."""

import socket

import pytest

from ftlaunch.backend.slurm import rendezvous
from ftlaunch.errors import UserError

LOOPBACK6 = rendezvous.IPV6.exists() and "00000000000000000000000000000001" in rendezvous.IPV6.read_text()
without_ipv6 = pytest.mark.skipif(not LOOPBACK6, reason="this machine has no IPv6: ::1 is no address of it")


def test_the_address_is_the_one_that_a_packet_to_the_peer_would_carry() -> None:
    assert rendezvous.own_address(["127.0.0.1"], None) == "127.0.0.1"
    assert rendezvous.own_address(["no-such-host.invalid", "127.0.0.1"], None) == "127.0.0.1"


def test_a_named_interface_is_taken() -> None:
    assert rendezvous.own_address(["no-such-host.invalid"], "lo") == "127.0.0.1"
    assert rendezvous.interface_of("127.0.0.1") == "lo"
    assert rendezvous.interface_of("192.0.2.1") is None


@without_ipv6
def test_an_address_of_ipv6_will_do_where_a_peer_has_no_other() -> None:
    assert rendezvous.own_address(["::1"], None) == "::1"
    assert rendezvous.interface_of("::1") == "lo"


def test_no_way_to_the_peers_and_no_such_interface_are_the_users_to_mend() -> None:
    with pytest.raises(UserError, match=r"no way leads from here to no-such-host\.invalid"):
        rendezvous.own_address(["no-such-host.invalid"], None)
    with pytest.raises(UserError, match="there is no interface ib7"):
        rendezvous.own_address(["127.0.0.1"], "ib7")


def test_neighbouring_jobs_and_restarts_get_other_ports_below_the_kernels_own() -> None:
    ports = [rendezvous.free_port(job, restart) for job in range(100, 120) for restart in range(3)]
    assert len({*ports}) == len(ports)
    assert all(rendezvous.FIRST_PORT <= port < 32768 for port in ports)


def test_a_port_in_use_is_passed_over() -> None:
    port = rendezvous.free_port(1, 0)
    for family in (socket.AF_INET, socket.AF_INET6)[: 1 + LOOPBACK6]:
        with socket.create_server(("", port), family=family):
            assert rendezvous.free_port(1, 0) == port + 1
