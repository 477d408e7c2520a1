"""The two halves of a causal language model: the body, up to the last hidden states, and the head that reads them.

Whatever lies between hidden states and logits (caps, scales, further layers) is computed by the model's own code: its
`forward` is called with a stand-in for the body that returns given hidden states.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ftlaunch.errors import UserError
from fttrain.model.borders import Packed
from fttrain.model.limits import TABLE


class Halves:
    """Access to the body of one causal language model, and to its head without the body."""

    def __init__(self, causal: Any) -> None:
        """Raises UserError where the model has no part that holds all but the head."""
        self.causal = causal
        self.name = _body_name(causal)
        self.packed: Packed | None = None
        """What passes over packed rows need; None until a check has found that rows may be packed."""
        by_rank = hasattr(causal.config, "keep_window_size")
        self.alone = by_rank or any("Indexer" in type(part).__name__ for part in causal.modules())
        """Whether each row has to be computed by itself: keys chosen by rank are others where a row is padded."""
        takes = inspect.signature(causal.forward).parameters
        self._options = {
            name: value
            for name, value in {"use_cache": False, "output_router_logits": False, "return_dict": True}.items()
            if name in takes
        }
        self._takes_ids = "input_ids" in takes
        self._first = _first_position(self.body)
        self.balances = "output_router_logits" in takes and self.router_weight is not None
        """Whether the model has a loss that balances its experts."""

    @property
    def body(self) -> Any:
        return self.causal.get_submodule(self.name)

    @property
    def width(self) -> int:
        """Width of the body's last hidden states; Electra's token table is narrower."""
        config = self.causal.config.get_text_config()
        return getattr(config, "word_embed_proj_dim", None) or config.hidden_size

    def positions(self, position_ids_BT: Tensor) -> Tensor:
        """Return positions that count from 0 as the model's own code counts them."""
        return position_ids_BT + self._first if self._first else position_ids_BT

    def head_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that turn hidden states into logits, tied ones included."""
        in_body = {id(parameter) for parameter in self.body.parameters()}
        outside = [parameter for parameter in self.causal.parameters() if id(parameter) not in in_body]
        return [*outside, *self.causal.get_output_embeddings().parameters()]

    @property
    def router_weight(self) -> float | None:
        """What the model's config multiplies that loss by."""
        names = ("router_aux_loss_coef", "aux_loss_coef")
        return next((getattr(self.causal, name) for name in names if hasattr(self.causal, name)), None)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """[N, D] → [N, V]. Only one thread may call a model at a time."""
        # Not [0]: the gradient of an index is a copy of all logits, that of a squeeze is a view.
        return self._headed(_Said(hidden_ND[None])).logits.squeeze(0)

    def router_loss(self, passed: Any, mask_BT: Tensor | None) -> Tensor:
        """The loss that balances experts, as the model's own code makes it of what its routers have said in a pass.

        `passed` is the body's output; the mask is 0 where there is padding.
        """
        said = _Said(passed.last_hidden_state[:1, :1], passed.router_logits)
        return self._headed(said, output_router_logits=True, attention_mask=mask_BT).aux_loss

    def _headed(self, said: "_Said", **asked: Any) -> Any:
        """What the whole model says when its body says that."""
        body = self.body
        hidden_1ND = said.last_hidden_state
        if self._takes_ids:
            asked["input_ids"] = torch.zeros(hidden_1ND.shape[:2], dtype=torch.long, device=hidden_1ND.device)
        self.causal._modules[self.name] = _StandIn(body, said)
        try:
            # Not by __call__: hooks of the whole model (PEFT's, DeepSpeed's) are for whole passes.
            return self.causal.forward(**(self._options | asked))
        finally:
            self.causal._modules[self.name] = body


class _StandIn:
    """Returns given hidden states from any call; other attributes are the body's."""

    def __init__(self, body: nn.Module, said: "_Said") -> None:
        self._body = body
        self._said = said

    def __call__(self, *_: object, **__: object) -> "_Said":
        return self._said

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._body, name)
        if isinstance(found, nn.Module) and _holds_layers(found):
            return self  # OPT's model holds the decoder, and its causal model calls that
        return found


class _Said:
    """An output of a body that has hidden states and, where they are given, what its routers have said."""

    def __init__(self, hidden_1ND: Tensor, router_logits: Any = None) -> None:
        self.last_hidden_state = hidden_1ND
        self.router_logits = router_logits

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, place: Any) -> Any:
        return (self.last_hidden_state,)[place]


def _holds_layers(module: nn.Module) -> bool:
    """Return whether the module holds the decoder's layers, at any depth."""
    return any(isinstance(part, nn.ModuleList) for part in module.children()) or any(
        _holds_layers(part) for part in module.children() if not isinstance(part, nn.ModuleList)
    )


def _first_position(body: nn.Module) -> int:
    """Return the position of a row's first token: RoBERTa's kind counts from the row of its table after padding's."""
    tables: list[Any] = [part for name, part in body.named_modules() if TABLE.search(name)]
    return next((one.padding_idx + 1 for one in tables if type(one) is nn.Embedding and one.padding_idx is not None), 0)


def _body_name(causal: Any) -> str:
    """Return the name of the child that holds the token embedding. Raises UserError where there is none."""
    embedding = causal.get_input_embeddings()
    for name, child in causal.named_children():
        if child is not embedding and any(part is embedding for part in child.modules()):
            return name
    message = f"{causal.config.model_type} models have no part that holds all but the head"
    raise UserError(message, "use a base of another family, such as llama, qwen3 or mistral")
