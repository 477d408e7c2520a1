"""Rules of [track]: what it asks of trackers that are named, and of those that are not."""

from collections.abc import Callable, Iterator

from ftlaunch.errors import Problem
from ftlaunch.load import Loaded
from ftlaunch.load.messages import as_toml

SEND = ("wandb", "comet", "swanlab")
"""Trackers that send what they are given, unless told to keep it."""


def trackers_are_named_once(loaded: Loaded) -> Iterator[Problem]:
    named: list[str] = [*loaded.recipe.track.to]
    for name in sorted({name for name in named if named.count(name) > 1}):
        yield loaded.problem(("track", "to"), f"names {as_toml(name)} {named.count(name)} times", "name it once")


def keys_have_a_tracker(loaded: Loaded) -> Iterator[Problem]:
    track = loaded.recipe.track
    if track.project is not None and not track.to:
        message = "counts only for a tracker, and to names none"
        yield loaded.problem(("track", "project"), message, 'remove it, or write to = ["tensorboard"]')
    if track.offline and not set(SEND) & set(track.to):
        message = f"counts only for {', '.join(SEND)}, and to names none of them"
        yield loaded.problem(("track", "offline"), message, "remove it: the others keep what they get on disk")


RULES: tuple[Callable[[Loaded], Iterator[Problem]], ...] = (trackers_are_named_once, keys_have_a_tracker)
