"""A merge without weights, before anything is trained: it checks that each adapted weight has its place on disk."""

from typing import Any

from ftlaunch.errors import UserError
from ftlaunch.recipe.model import Model
from fttrain.adapters import TRAINED
from fttrain.merging import deltas, weight_map
from fttrain.merging.weight_map import WeightMap


def check(base: Model, model: Any) -> None:
    """Raise UserError if the adapter that is about to be trained could not be merged.

    Reads only headers of files and shapes, so it takes a second at most and gives the same result on all ranks.
    """
    stored = {one.key: one for one in weight_map.stored(weight_map.folder_of(base))}
    places = WeightMap(model.get_base_model(), list(stored))
    try:
        deltas.fitted(deltas.deltas(model, TRAINED), places).rehearse(stored)
    except UserError as error:
        raise UserError(f"this adapter could not be merged into {base.path}: {error.message}", error.remedy) from error
