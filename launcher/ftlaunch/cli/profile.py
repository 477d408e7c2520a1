"""The cluster that a verb is told of, with what is set for once."""

import sys
from typing import TYPE_CHECKING

from ftlaunch.errors import UserError

if TYPE_CHECKING:
    from ftlaunch.cluster.vocabulary import Cluster


def load_named(name: str | None, site: list[str] | None) -> "Cluster | None":
    """The profile of that name with what is set for once, and a word on which file it is; None for this machine."""
    if name is None:
        if site:
            raise UserError("--site sets keys of a cluster's profile, and none is named", "add --cluster NAME")
        return None
    from ftlaunch.cluster.profiles import find_profile, load_cluster

    cluster = load_cluster(name, site or [])
    print(f"cluster {name}: {find_profile(name)}", file=sys.stderr)
    return cluster
