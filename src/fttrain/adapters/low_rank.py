"""LoRA and rsLoRA, which PEFT knows well: the ground on which other kinds of low-rank adapters stand."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from peft import LoraConfig, TaskType
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ftlaunch.errors import UserError
from ftlaunch.recipe.adapter import LowRank, Rslora
from fttrain.adapters import peft_files, targets

A = TypeVar("A", bound=LowRank)


@dataclass(frozen=True)
class Method(Generic[A]):
    """What a kind of low-rank adapter does. A kind overrides what it does otherwise than LoRA."""

    adapter: A
    name: str
    """PEFT's name for it."""
    accumulation: int = 1
    """Backward passes that make a step."""

    options: ClassVar[Mapping[str, Any]] = {}
    """Further arguments of PEFT's LoraConfig."""
    is_saved_as_trained: ClassVar[bool] = True
    """Whether what is saved has the shapes of what is trained, so that PEFT can load it for a stage that goes on."""

    def attach(self, model: Any, start: Path | None, *, in_fp32: bool) -> nn.Module:
        """The model with the adapter on its targets: a new one, or that of the artifact folder `start`."""
        if start is not None and self.is_saved_as_trained:
            dropout = self.adapter.dropout
            wrapped = peft_files.load(model, start, self.name, trained=True, in_fp32=in_fp32, dropout=dropout)
        else:
            wrapped = peft_files.add(model, self._config(model), self.name, in_fp32=in_fp32)
        _leave_inputs_alone(wrapped)
        self.install(wrapped, start)
        return wrapped

    def _config(self, model: nn.Module) -> LoraConfig:
        adapter = self.adapter
        return LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=adapter.first_rank,
            lora_alpha=adapter.alpha,  # type: ignore[arg-type]
            lora_dropout=adapter.dropout,
            target_modules=targets.names(model, adapter),
            target_parameters=_experts(model, adapter),
            use_rslora=isinstance(adapter, Rslora),
            **self.options,
        )

    def install(self, model: nn.Module, start: Path | None) -> None:
        """Make the layers of LoRA into what the kind has: new ones, or such as the artifact folder `start` holds."""

    def layers(self, model: nn.Module) -> Iterator[tuple[str, Any]]:
        """The layers that the adapter is in, each with its name in the model."""
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer) and self.name in module.lora_A:
                yield name, module

    def keys(self, layer: str) -> tuple[str, str]:
        """Return the names of a layer's A and B among the trained weights."""
        return f"{layer}.lora_A.{self.name}.weight", f"{layer}.lora_B.{self.name}.weight"

    def as_plain_lora(self, model: nn.Module, weights: dict[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:  # noqa: ARG002 as kinds have them
        """The trained weights as plain PEFT loads them; the config is changed to say so."""
        return weights

    def save(self, model: Any, weights: dict[str, Tensor], folder: Path) -> None:
        """Write the trained weights, whole and by their names, as plain PEFT loads them on the unchanged base."""
        weights = self.as_plain_lora(model, weights, model.peft_config[self.name])
        held = model.peft_config[self.name]
        model.peft_config[self.name] = peft_files.portable(model, self.name)
        # PEFT would ask the hub whether the vocabulary was resized; nothing here resizes it.
        model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False, selected_adapters=[self.name])
        model.peft_config[self.name] = held

    def state(self, model: nn.Module, num_steps: int) -> Any:
        """What checkpoints of a stage with so many optimizer steps carry of it, other than trained weights and moments
        (`Stateful`); None where nothing."""


def _experts(model: nn.Module, adapter: LowRank) -> list[str] | None:
    if not adapter.experts:
        return None
    found = targets.experts(model, adapter)
    if not found:
        kind = model.config.model_type  # type: ignore[union-attr]
        raise UserError(f"adapter.experts: this {kind} model has none in the layers asked for", "remove the key")
    if past := [name for name in found if targets.is_read_past(model, name)]:
        kind = type(model.get_submodule(past[0].rpartition(".")[0])).__name__
        message = f"adapter.experts: code around {kind} reads its weights past an adapter, which would never be trained"
        raise UserError(message, "remove the key, or train in full: leave [adapter] out")
    return found


def _leave_inputs_alone(model: nn.Module) -> None:
    """Under autocast PEFT's cast of the input to fp32 is undone at once by the matrix product."""
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]
