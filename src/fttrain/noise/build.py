"""The noise of a stage, put on its model."""

from torch import nn

from ftlaunch.recipe.noise import Adversarial, Noise, NoNoise, Saturated
from fttrain.noise.adversarial import AdversarialNoise
from fttrain.noise.hooks import ActivationNoise, SampledNoise
from fttrain.noise.row_index import Places


def disturbance(model: nn.Module, names: list[str], noise: Noise, places: Places) -> ActivationNoise:
    """Add the recipe's noise to the outputs of the model's modules of these names, in training only."""
    modules = [model.get_submodule(name) for name in names]
    match noise:
        case NoNoise() | Saturated():  # the noise of the latter is in the activation function itself
            return ActivationNoise()
        case Adversarial():
            return AdversarialNoise(noise, modules, places)
        case _:
            return SampledNoise(noise, modules, places)
