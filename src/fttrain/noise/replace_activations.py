"""Replacing the activation functions of a model, and naming them in its config."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from ftlaunch.errors import UserError
from ftlaunch.recipe.noise import HIDDEN_ACT, MLP, Noise, no_config_says, replaces
from ftlaunch.run.layout import CARD
from fttrain.noise import activation_functions, modules

CONFIG_KEYS = ("hidden_act", "hidden_activation", "activation_function")
"""Under which configs name the activation function of MLP blocks."""


def install(model: Any, tables: Sequence[Noise]) -> None:
    """Replace activation functions of a transformers model as the [noise] tables say, in their order.

    Where all MLP blocks have a new one the model's config names it, too. Raises UserError where there is no such site.
    """
    for table in tables:
        if not replaces(table):
            continue
        for name in modules.find(model, table.sites):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, activation_functions.make(table).train(model.training))
        if table.sites == MLP:
            for key in _config_keys(vars(model.config)):
                setattr(model.config, key, HIDDEN_ACT.get(table.activation, table.activation))


def read(folder: Path) -> tuple[Noise, ...]:
    """Return the [noise] tables that replaced activation functions of an artifact; () where there is no artifact."""
    card = folder / CARD
    if not card.exists():
        return ()
    return msgspec.convert(json.loads(card.read_text()).get("activations", []), tuple[Noise, ...])


def make_known() -> None:
    """Have transformers build models whose configs name activation functions that only ftlaunch has.

    Elsewhere such a config is refused by name, which is better than a model that computes something else.
    """
    from transformers.activations import ACT2FN

    ACT2FN.update(
        {
            name: kind
            for name, kind in activation_functions.BY_NAME.items()
            if name not in HIDDEN_ACT and name not in ACT2FN
        }
    )


def write_into(config: dict[str, Any], tables: Sequence[Noise]) -> None:
    """Name the activation function that the tables have put in, in the config of a merged model.

    Raises UserError where no config can say it.
    """
    for table in filter(replaces, tables):
        keys = _config_keys(config)
        reason = no_config_says(table) or (None if keys else f"this config has none of {', '.join(CONFIG_KEYS)}")
        if reason:
            message = f"a merged model could not hold the activation function {table.activation}: {reason}"
            raise UserError(
                message, "ship base and adapter unmerged: `ftlaunch chat` applies artifact.json's activations"
            )
        config.update(dict.fromkeys(keys, HIDDEN_ACT[table.activation]))


def _config_keys(config: dict[str, Any]) -> list[str]:
    return [key for key in CONFIG_KEYS if config.get(key) is not None]
