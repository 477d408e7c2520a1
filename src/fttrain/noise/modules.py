"""Modules of a model by the words of a recipe."""

import re

from torch import nn

from ftlaunch.errors import UserError
from ftlaunch.recipe.noise import MLP
from fttrain.noise import activation_functions

MOST_CANDIDATES = 20


def find(model: nn.Module, sites: str | list[str]) -> list[str]:
    """Names of the modules that `noise.sites` means, in the model's order. Raises UserError where it means none."""
    names = [name for name, _ in model.named_modules() if name]
    if sites == MLP:
        found = _activations(model)
    elif isinstance(sites, str):
        found = [name for name in names if re.fullmatch(sites, name)]
    else:
        found = [name for name in names if any(name == site or name.endswith(f".{site}") for site in sites)]
        stray = [site for site in sites if not any(name == site or name.endswith(f".{site}") for name in names)]
        if stray:
            raise UserError(f"noise.sites: no module of the model is called {', '.join(stray)}", _candidates(model))
    if not found:
        raise UserError(f"noise.sites {sites!r} matches no module of the model", _candidates(model))
    return found


def _activations(model: nn.Module) -> list[str]:
    """Names of the modules that are activation functions."""
    known = activation_functions.classes()
    # An activation function may be made of others, such as a clipped GELU: only the outer one is a site.
    inner = {id(child) for module in model.modules() if isinstance(module, known) for child in module.children()}
    named = model.named_modules()
    return [name for name, module in named if isinstance(module, known) and id(module) not in inner]


def _candidates(model: nn.Module) -> str:
    activations = sorted({name.rpartition(".")[2] for name in _activations(model)})
    others = sorted({name.rpartition(".")[2] for name, _ in model.named_modules()} - {*activations, ""})
    others = [name for name in others if not name.isdigit()][:MOST_CANDIDATES]
    return f"activation functions are called: {', '.join(activations) or 'none'}; other modules: {', '.join(others)}"
