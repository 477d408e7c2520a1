"""Coordinates of super weights that others have published (arXiv 2411.07191, table 2), compared with what was found."""

import json
from pathlib import Path

from fttrain.superweights.projections import Place

FILE = Path(__file__).with_name("known.json")


def published(model: str) -> list[Place]:
    """Coordinates of a model of this hub id, or of a folder called like its last part; [] if it is not among them."""
    name = Path(model).name.casefold()
    table: dict[str, list[list[int]]] = json.loads(FILE.read_text())
    rows = next((rows for key, rows in table.items() if key.rpartition("/")[2].casefold() == name), [])
    return [Place(*row) for row in rows]
