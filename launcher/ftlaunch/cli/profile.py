"""The backend that a verb is told of by --cluster, with what is set for once."""

import os
import shutil
import sys
from typing import TYPE_CHECKING

from ftlaunch.errors import UserError

if TYPE_CHECKING:
    from ftlaunch.backend.protocol import Backend
    from ftlaunch.cluster.vocabulary import Cluster
    from ftlaunch.load import Loaded
    from ftlaunch.recipe.recipe import Recipe


def backend_named(name: str | None, site: list[str] | None) -> "Backend":
    """The backend of the profile of that name; without one: here."""
    from ftlaunch.backend import backends

    return backends.on(_load_named(name, site))


def _load_named(name: str | None, site: list[str] | None) -> "Cluster | None":
    """The profile of that name with what is set for once, and a word on which file it is; None for this machine."""
    if name is None:
        if site:
            from ftlaunch.cluster import NAME_ONE

            raise UserError("--site sets keys of a cluster's profile, and none is named", NAME_ONE)
        return None
    from ftlaunch.cluster.profiles import find_profile, load_cluster

    cluster = load_cluster(name, site or [])
    print(f"cluster {name}: {find_profile(name)}", file=sys.stderr)
    return cluster


def for_recipe(loaded: "Loaded", name: str | None, site: list[str] | None) -> "Backend":
    """The backend that a recipe is to run on. RecipeError where it was settled by what is true of another place."""
    from ftlaunch.backend import backends

    backend = backends.on(_chosen(loaded.recipe, name, site))
    backend.check(loaded)
    return backend


def _chosen(recipe: "Recipe", name: str | None, site: list[str] | None) -> "Cluster | None":
    """The profile that is named; else, where a recipe wants several nodes and SLURM is here, the one that counts then.

    That is the profile which FTLAUNCH_CLUSTER names, or the one called "default", or the cluster's own defaults. It is
    said which. On nodes that are held already, and on a machine without SLURM, there is none.
    """
    # getattr: training and evaluation may have a [parallel] table of their own; a merge has no such key.
    several = any((getattr(stage, "parallel", None) or recipe.parallel).nodes > 1 for stage in recipe.stage)
    if name is not None or not several or "SLURM_JOB_ID" in os.environ or shutil.which("sbatch") is None:
        return _load_named(name, site)
    from ftlaunch.cluster.profiles import find_profile, load_cluster

    named = os.environ.get("FTLAUNCH_CLUSTER")
    why = "FTLAUNCH_CLUSTER names it"
    if not named:
        try:
            find_profile("default")
        except UserError:
            print("cluster: SLURM's own defaults, as the recipe wants several nodes (no --cluster)", file=sys.stderr)
            return load_cluster(None, site or [])
        named, why = "default", "there is one of that name"
    print(f"cluster: profile {named}, as the recipe wants several nodes and {why}", file=sys.stderr)
    return _load_named(named, site)
