"""Where the nodes of a job meet: address and port of the first one, and the network interface that leads there."""

import errno
import fcntl
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from ftlaunch.errors import UserError

SIOCGIFADDR = 0x8915
IPV6 = Path("/proc/net/if_inet6")
"""A line for each IPv6 address: its digits, three numbers of which the last is the scope, flags and interface."""
LINK_LOCAL = "20"
FIRST_PORT, PORTS = 10000, 20000
"""Below the range from which the kernel takes ports for outgoing connections (32768 up)."""
STRIDE = 7919
"""Neighbouring job ids are so many ports apart, a prime to the number of ports."""
TRIES = 64


def own_address(peers: Sequence[str], interface: str | None) -> str:
    """The address of this node that the others reach it by, IPv4 where there is one. UserError where none is found."""
    if interface is not None:
        found = next((address for name, address in _interfaces() if name == interface), None)
        if found is None:
            raise UserError(f"there is no interface {interface} with an address here", "correct `interface`")
        return found
    for peer in peers:
        try:
            return _source_towards(peer)
        except OSError:
            continue
    raise UserError(f"no way leads from here to {', '.join(peers)}", "name the network in the profile's `interface`")


def network_variables(peers: Sequence[str], interface: str | None) -> dict[str, str]:
    """Which interface the ranks talk over. gloo would otherwise take whatever the host's own name leads to."""
    own = own_address(peers, interface)
    name = interface or interface_of(own)
    return {f"{library}_SOCKET_IFNAME": name for library in ("GLOO", "NCCL", "TP")} if name else {}


def interface_of(address: str) -> str | None:
    """The interface that has an address of this node; None where it is not the first one of any."""
    return next((name for name, found in _interfaces() if found == address), None)


def _source_towards(host: str) -> str:
    """The address that a packet from here to there would carry. Nothing is sent. OSError where no way leads there."""
    error = OSError("it has no address")
    # Any port would do, and 9 is "discard". Sorted, IPv4 comes first.
    for family, kind, _, _, address in sorted(socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)):
        try:
            with socket.socket(family, kind) as probe:
                # On a UDP socket this only looks up the route.
                probe.connect(address)
                return str(probe.getsockname()[0])
        except OSError as failed:
            error = failed
    raise error


def _interfaces() -> Iterator[tuple[str, str]]:
    """Interfaces with their addresses: the first IPv4 address of each, then IPv6 addresses that other nodes reach."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                # struct ifreq: a name of up to 15 bytes in 16, then sockaddr_in with the address in bytes 20 to 23.
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # it has none
            yield name, socket.inet_ntoa(answer[20:24])
    if IPV6.exists():
        for line in IPV6.read_text().splitlines():
            digits, _, _, scope, _, name = line.split()
            # fe80:… addresses are good only together with the name of an interface.
            if scope != LINK_LOCAL:
                yield name, socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))


def free_port(job: int, restart: int) -> int:
    """A port that nothing here listens on, another one for each start of each job. UserError where all are taken."""
    # A restart tries another port first, as connections of the last start may linger on its own.
    first = job * STRIDE + restart
    for port in (FIRST_PORT + (first + attempt) % PORTS for attempt in range(TRIES)):
        # Both kinds of addresses are asked for, as the processes listen on both where they can.
        if all(_is_free(family, port) for family in (socket.AF_INET, socket.AF_INET6)):
            return port
    raise UserError(f"none of {TRIES} ports from {FIRST_PORT + first % PORTS} is free", "exclude this node")


def _is_free(family: int, port: int) -> bool:
    """Whether nothing listens on a port here; so it is where there are no addresses of the family."""
    try:
        with socket.socket(family) as probe:
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(("", port))
    except OSError as error:
        return error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
    return True
