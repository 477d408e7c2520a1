"""An address of its own for each node: a bridge, and one network namespace with a veth pair a node."""

import os
import subprocess
from pathlib import Path

from configuration import BRIDGE_ADDRESS, Layout

BRIDGE = "ftl-dev"
NAMESPACES = Path("/run/netns")


def namespace(node: str) -> str:
    """Return the name of a node's network namespace."""
    return f"ftl-{node}"


def link(node: str) -> str:
    """The host's end of a node's cable: `ip link set ftl-n1 down` pulls it out."""
    return f"ftl-{node}"


def possible() -> bool:
    """Whether this process may make namespaces, tried with one of each kind that a node has."""
    if os.geteuid() != 0:
        return False
    if (NAMESPACES / namespace("n1")).exists():
        return True
    trial = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "ip", "link", "add", "trial"]
    done = subprocess.run([*trial, "type", "bridge"], capture_output=True, check=False)
    return done.returncode == 0


def build(layout: Layout) -> None:
    """Make what is not there yet."""
    if not _exists(BRIDGE):
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("address", "add", f"{BRIDGE_ADDRESS}/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
    for name, address in layout.addresses().items():
        if not (NAMESPACES / namespace(name)).exists():
            _build_node(name, address)
        _ip("link", "set", link(name), "up")


def _build_node(name: str, address: str) -> None:
    inside = namespace(name)
    _ip("netns", "add", inside)
    _ip("link", "add", link(name), "type", "veth", "peer", "name", "eth0", "netns", inside)
    _ip("link", "set", link(name), "master", BRIDGE)
    _ip("-n", inside, "address", "add", f"{address}/24", "dev", "eth0")
    for device in ("lo", "eth0"):
        _ip("-n", inside, "link", "set", device, "up")
    _ip("-n", inside, "route", "add", "default", "via", BRIDGE_ADDRESS)


def remove() -> None:
    """Remove every namespace and the bridge, whatever layout made them."""
    if NAMESPACES.is_dir():
        for path in NAMESPACES.glob("ftl-n*"):
            _ip("netns", "delete", path.name)
    for name in _links():
        _ip("link", "delete", name)
    if _exists(BRIDGE):
        _ip("link", "delete", BRIDGE)


def _links() -> list[str]:
    """The host's ends of cables that outlive their namespace for a moment."""
    return [path.name for path in Path("/sys/class/net").glob("ftl-n*")]


def _exists(device: str) -> bool:
    return Path("/sys/class/net", device).exists()


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    gone = "Cannot find device" in done.stderr and "delete" in arguments
    assert done.returncode == 0 or gone, f"ip {' '.join(arguments)}: {done.stderr}"
