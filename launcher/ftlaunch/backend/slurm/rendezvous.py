"""Where the nodes of a job meet: address and port of the first one, and the network interface that leads there."""

import fcntl
import socket
import struct
from collections.abc import Sequence

from ftlaunch.errors import UserError

SIOCGIFADDR = 0x8915
FIRST_PORT, PORTS = 10000, 20000
"""Below the range from which the kernel takes ports for outgoing connections (32768 up)."""
STRIDE = 7919
"""Neighbouring job ids are so many ports apart, a prime to the number of ports."""
TRIES = 64


def own_address(peers: Sequence[str], interface: str | None) -> str:
    """The IPv4 address of this node that the others reach it by. UserError where none can be found."""
    if interface is not None:
        found = _interfaces().get(interface)
        if found is None:
            raise UserError(f"there is no interface {interface} with an address here", "correct `interface`")
        return found
    for peer in peers:
        try:
            return _source_towards(peer)
        except OSError:
            continue
    raise UserError(f"no way leads from here to {', '.join(peers)}", "name the network in the profile's `interface`")


def interface_of(address: str) -> str | None:
    """The interface that has an address of this node; None where it is not the first one of any."""
    return next((name for name, found in _interfaces().items() if found == address), None)


def _source_towards(host: str) -> str:
    """The address that a packet from here to there would carry. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # On a UDP socket this only looks up the route; any port would do, and 9 is "discard".
        probe.connect((host, 9))
        return str(probe.getsockname()[0])


def _interfaces() -> dict[str, str]:
    """The first IPv4 address of each interface."""
    found: dict[str, str] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                # struct ifreq: a name of up to 15 bytes in 16, then sockaddr_in with the address in bytes 20 to 23.
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # it has none
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def free_port(job: int, restart: int) -> int:
    """A port that nothing here listens on, another one for each start of each job. UserError where all are taken."""
    # A restart tries another port first, as connections of the last start may linger on its own.
    first = job * STRIDE + restart
    for port in (FIRST_PORT + (first + attempt) % PORTS for attempt in range(TRIES)):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise UserError(f"none of {TRIES} ports from {FIRST_PORT + first % PORTS} is free", "exclude this node")
