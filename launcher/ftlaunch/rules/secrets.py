"""Rules for secrets in a recipe: there is no key for one, and the run folder keeps what the recipe says."""

from collections.abc import Iterator

import msgspec

from ftlaunch.errors import Problem
from ftlaunch.load import Loaded
from ftlaunch.load.origins import KeyPath, Toml
from ftlaunch.safety.redact import pattern

MESSAGE = "holds what looks like a secret (a token, or the value of an environment variable named like one)"
REMEDY = "take it out: no key needs one. The hub's token comes from `hf auth login` or the environment"


def secrets_stay_out(loaded: Loaded) -> Iterator[Problem]:
    """Refuse secrets in the file's lines, comments included, and in what `extends`, `--set` or the folder put in."""
    secret = pattern()
    lines = enumerate(loaded.text.splitlines(), start=1)
    places = [f"{loaded.source}:{number}" for number, line in lines if secret.search(line)]
    yield from (Problem(place, "", MESSAGE, REMEDY) for place in places)
    # Through JSON, after which only tables, lists and texts are left to search.
    for path, text in _texts(msgspec.json.decode(msgspec.json.encode(loaded.recipe)), ()):
        # A line of the file itself has been reported above.
        if secret.search(text) and loaded.where(path) not in places:
            yield loaded.problem(path, MESSAGE, REMEDY)


def _texts(value: Toml, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    """Every text and every name of a key, with the path to it."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, child in value.items():
            yield (*path, key), key
            yield from _texts(child, (*path, key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _texts(child, (*path, index))
