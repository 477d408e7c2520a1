"""Families that no library has, each a Llama with one part that breaks a layout of rows or needs its own code."""

from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from tests.conftest import _byte_tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: F401 modules of families that use it have it
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
EXPERTS, CAPACITY = 2, 6


class Around(nn.Module):
    """What wraps the first layer's MLP."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner


class Centred(Around):
    """It subtracts the mean of the whole batch, up to here in time: of other rows, too, and of padding."""

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        counts_T = torch.arange(1, hidden_BTD.shape[1] + 1, device=hidden_BTD.device)
        means_TD = hidden_BTD.mean(0).cumsum(0) / counts_T[:, None]
        return self.inner(hidden_BTD - means_TD)


class Normed(Around):
    """Statistics of the batch that it is trained on, and running ones otherwise."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.norm = nn.BatchNorm1d(SHAPE["hidden_size"])

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.inner(self.norm(hidden_BTD.flatten(0, 1)).view_as(hidden_BTD))


class Crowded(Around):
    """A router that has room for so many tokens of a batch in each expert; the rest pass by."""

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        flat_ND = hidden_BTD.flatten(0, 1)
        chosen_N = (flat_ND[:, 0] > 0).long()
        order_N = F.one_hot(chosen_N, EXPERTS).cumsum(0).gather(1, chosen_N[:, None])[:, 0]
        fits_N1 = (order_N <= CAPACITY)[:, None]
        return self.inner(flat_ND * fits_N1).view_as(hidden_BTD)


class Unmasked(nn.Module):
    """Attention that is causal in its line, whatever mask it is given."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: Tensor, position_embeddings: Any, **_: Any) -> tuple[Tensor, None]:
        shape = (*hidden_states.shape[:-1], -1, self.inner.head_dim)
        projections = self.inner.q_proj, self.inner.k_proj, self.inner.v_proj
        q, k, v = (one(hidden_states).view(shape).transpose(1, 2) for one in projections)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.inner.o_proj(out.transpose(1, 2).flatten(2)), None


class ByPlace(nn.Embedding):
    """An embedding of tokens and of where they stand in their line."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__(tokens, width)
        self.places = nn.Parameter(torch.randn(512, width))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 0.3 * self.places[: input.shape[1]]


class Toy(LlamaForCausalLM):
    """A Llama with `part` around its first MLP."""

    part: ClassVar[type[Around] | None] = None

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if self.part is not None:
            self.model.layers[0].mlp = self.part(self.model.layers[0].mlp)


class CentredToy(Toy):
    part = Centred


class NormedToy(Toy):
    part = Normed


class CrowdedToy(Toy):
    part = Crowded


class UnmaskedToy(Toy):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        attention: Any = Unmasked(self.model.layers[1].self_attn)
        self.model.layers[1].self_attn = attention


class PlacedToy(Toy):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.embed_tokens = ByPlace(config.vocab_size, config.hidden_size)


class BiasedToy(Toy):
    """Its logits have a bias by position."""

    def forward(self, *given: Any, **asked: Any) -> Any:
        said: Any = super().forward(*given, **asked)
        places, tokens = (torch.arange(size, device=said.logits.device) for size in said.logits.shape[1:])
        said.logits = said.logits + (places[:, None] * tokens % 7).float()
        return said


class TiedToy(Toy):
    """Its logits are divided by the size of the embeddings, which they are tied to."""

    def forward(self, *given: Any, **asked: Any) -> Any:
        said: Any = super().forward(*given, **asked)
        said.logits = said.logits / self.get_input_embeddings().weight.norm(dim=1).mean()
        return said


TOYS: dict[str, type[Toy]] = {
    "centred": CentredToy,
    "normed": NormedToy,
    "crowded": CrowdedToy,
    "unmasked": UnmaskedToy,
    "placed": PlacedToy,
    "biased": BiasedToy,
    "tied": TiedToy,
}


def _register(name: str, family: type[Toy]) -> None:
    config = type(f"{family.__name__}Config", (LlamaConfig,), {"model_type": f"toy_{name}"})
    family.config_class = config
    AutoConfig.register(f"toy_{name}", config)
    AutoModelForCausalLM.register(config, family)


for _name, _family in TOYS.items():
    _register(_name, _family)


def saved(name: str, folder: Path) -> Path:
    """A tiny model of the family in a folder, with a tokenizer of bytes."""
    tokenizer = _byte_tokenizer()
    torch.manual_seed(0)
    config: Any = TOYS[name].config_class
    ties = {"tie_word_embeddings": name == "tied"}
    model = TOYS[name](config(**SHAPE, **ties, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=257))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
