"""Runs on this machine."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ftlaunch.backend.protocol import Backend
    from ftlaunch.cluster.vocabulary import Cluster
    from ftlaunch.run.layout import RunDir


def choose(_run: "RunDir | None", _cluster: "Cluster | None", _otherwise: "Backend | None") -> "Backend":
    """This machine, where no other backend's choice follows."""
    from ftlaunch.backend.local.driver import Local

    return Local()
