"""Families of transformers as tiny models with random weights."""

from pathlib import Path
from typing import Any

import torch
from tests.conftest import _byte_tokenizer
from tests.zoo.configs import CONFIGS, SHAPE
from tests.zoo.more_configs import MORE
from tests.zoo.vision_configs import VISION
from torch import nn
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fttrain.model.families import auto_class

FAMILIES = {**CONFIGS, **MORE, **VISION}


def build(name: str, folder: Path, **fields: Any) -> Path:
    """The family's tiny model in a folder, with a tokenizer of bytes; weights so large that all parts of it show.

    `fields` of the config replace the family's.
    """
    torch.manual_seed(0)
    config = _config(name, fields)
    model = auto_class(config).from_config(config, dtype=torch.float32)
    _enlarge(model)
    model.save_pretrained(folder)
    _byte_tokenizer().save_pretrained(folder)
    return folder


def _config(name: str, fields: dict[str, Any]) -> Any:
    kind, own = FAMILIES[name]
    own = own | fields
    family = CONFIG_MAPPING[kind]
    if "text_config" in own:
        return AutoConfig.for_model(kind, **own)
    names: dict[str, str] = getattr(family, "attribute_map", {})
    known = {*getattr(family, "__dataclass_fields__", {}), *names}
    shape = {key: value for key, value in SHAPE.items() if key in known and names.get(key) not in own}
    return family(**{**shape, **own})


@torch.no_grad()
def _enlarge(model: nn.Module) -> None:
    torch.manual_seed(5)
    for key, weight in model.named_parameters():
        if "sink" in key:
            weight.normal_()
        elif weight.dim() == 3 and "conv" in key:
            weight.normal_(std=0.5)
        elif weight.dim() >= 2 and not any(
            part in key for part in ("A_log", "rg_lru", "recurrent_gate", "conv", "time_")
        ):
            is_table = any(part in key for part in ("embed", "wte", "wpe"))
            weight.normal_(std=0.3 if is_table else weight.shape[-1] ** -0.5)
