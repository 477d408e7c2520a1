"""A real SLURM cluster on this one machine, to try ftlaunch with and to test it: `python3 slurm/devcluster up`."""

import argparse
import json
import shutil
import subprocess
import sys
import time

import daemons
import network
import packages
from configuration import CONF, STATE, Layout, read_layout, write_configuration

START_SECONDS = 60.0
READY = {"idle", "mixed", "allocated", "completing"}
"""SLURM's words for a node that answers; a star after them means that it does not."""


def main() -> int:
    """Do what the command line asks for; 1 with a reason on stderr where it cannot be done."""
    arguments = _parser().parse_args()
    try:
        arguments.verb(arguments)
    except (daemons.Failed, packages.Missing) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="devcluster", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="up|down|status")
    starting = verbs.add_parser("up", help="start the cluster; what already runs is left alone")
    yes_or_no = argparse.BooleanOptionalAction
    starting.add_argument("--nodes", type=int, metavar="N", help="number of nodes (default 3)")
    starting.add_argument(
        "--accounting", action=yes_or_no, help="slurmdbd and MariaDB, so that sacct works (default no)"
    )
    starting.add_argument(
        "--ports", action=yes_or_no, help="nodes as ports of this host (default: namespaces, if root)"
    )
    starting.set_defaults(verb=up)
    verbs.add_parser("down", help="end it and remove everything it made").set_defaults(verb=down)
    verbs.add_parser("status", help="show what runs").set_defaults(verb=status)
    return parser


def up(wanted: argparse.Namespace) -> None:
    """Start what does not run yet, as it was where nothing else is asked for.

    Another layout is taken down first, and what is left of a cluster that died as a whole, as when a machine restarts.
    """
    before = read_layout()
    layout = _layout(wanted, before)
    packages.require(accounting=layout.accounting)
    if before is not None and (before != layout or not daemons.running()):
        down(wanted)
    write_configuration(layout)
    if layout.network:
        network.build(layout)
    daemons.start(layout)
    _wait_for_nodes(layout)
    status(wanted)


def _layout(wanted: argparse.Namespace, before: Layout | None) -> Layout:
    before = before or Layout(nodes=3, accounting=False, network=network.possible())
    return Layout(
        nodes=before.nodes if wanted.nodes is None else wanted.nodes,
        accounting=before.accounting if wanted.accounting is None else wanted.accounting,
        network=before.network if wanted.ports is None else not wanted.ports,
    )


def _wait_for_nodes(layout: Layout) -> None:
    deadline = time.monotonic() + START_SECONDS
    while len(states := node_states()) < layout.nodes or not READY.issuperset(states):
        if time.monotonic() > deadline:
            raise daemons.Failed(f"nodes are {states or 'unknown'} after {START_SECONDS:g} s: see {STATE}/log")
        if any(state.startswith(("down", "drain")) for state in states):
            names = ",".join(layout.node_names())
            _scontrol("update", f"nodename={names}", "state=resume", "reason=devcluster")
        time.sleep(0.2)


def node_states() -> list[str]:
    """A word of SLURM's for each node, such as `idle`; empty while the controller does not answer."""
    command = ["sinfo", "--noheader", "--Node", "--partition=main", "--format=%T"]
    done = subprocess.run(command, env=daemons.environment(), capture_output=True, text=True, check=False)
    return done.stdout.split()


def _scontrol(*arguments: str) -> None:
    subprocess.run(["scontrol", *arguments], env=daemons.environment(), capture_output=True, check=False)


def down(_: argparse.Namespace) -> None:
    """End every process, and remove namespaces, bridge and state."""
    daemons.stop()
    network.remove()
    shutil.rmtree(STATE, ignore_errors=True)


def status(_: argparse.Namespace) -> None:
    """Print what runs as JSON, with the variable that leads SLURM's commands to it."""
    layout = read_layout()
    states = node_states() if layout else []
    told = {"up": bool(states), "daemons": daemons.running(), "environment": {"SLURM_CONF": str(CONF)}}
    if layout is not None:
        told |= {"nodes": dict(zip(layout.node_names(), states, strict=False)), "accounting": layout.accounting}
        told["addresses"] = "a network namespace a node" if layout.network else "ports of this host"
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    sys.exit(main())
