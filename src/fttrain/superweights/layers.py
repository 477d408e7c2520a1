"""`adapter.layers = "super-weights"`: the layers that hold a super weight, found before a stage begins."""

import gc

import msgspec
import torch

from ftlaunch.errors import UserError
from ftlaunch.recipe.adapter import SUPER_WEIGHTS, Adapter, LowRank
from ftlaunch.recipe.model import Model
from ftlaunch.tools import SpikeLimits
from fttrain.distributed.world import World
from fttrain.model.scorer import DTYPES, load_base, load_tokenizer
from fttrain.superweights.find import PROMPT, find
from fttrain.superweights.projections import unseen


def resolved(adapter: Adapter, base: Model, world: World) -> Adapter:
    """The adapter with the numbers of its layers, where the recipe asks for those with super weights. Collective.

    Rank 0 looks, at a copy of the base in its dtype that it loads for that; all ranks get what it found. Raises
    UserError on each where the base has no super weights.
    """
    if not isinstance(adapter, LowRank) or adapter.layers != SUPER_WEIGHTS:
        return adapter
    found = world.from_main(_look(base) if world.is_main else [])
    if not found:
        message = f'adapter.layers {SUPER_WEIGHTS!r}: {base.path} has none: no weight passes what "superweights" asks'
        raise UserError(message, 'see `ftlaunch superweights`; name layers by number, or "top:N"')
    if world.is_main:
        print(f"super weights are in layers {', '.join(map(str, found))}: these are adapted")
    return msgspec.structs.replace(adapter, layers=found)


def _look(base: Model) -> list[int]:
    tokenizer = load_tokenizer(base.path, base.revision)
    # A super weight is found by the size of activations, which weights in few bits change.
    plain = msgspec.structs.replace(base, quantization="none")
    model = load_base(plain, dtype=DTYPES[base.dtype], packing=False).eval()
    found = find(model, torch.tensor([tokenizer(PROMPT)["input_ids"]]), SpikeLimits())
    if missed := unseen(model):
        print(missed)
    # Freed here, as the stage is about to load its own copy: both at once may not fit.
    del model
    gc.collect()
    return sorted({place.layer for place in found.places})
