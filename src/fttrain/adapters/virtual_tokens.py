"""Prefix tuning, prompt tuning and P-tuning: virtual tokens before every row, made by one of PEFT's small encoders.

The artifact has the encoder's output, which PEFT loads; an encoder that is more than a table has a file of its own, for
a stage that trains it further.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, TaskType, get_peft_model
from peft.tuners import PrefixEncoder, PromptEncoder
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ftlaunch.recipe.adapter import Prefix, Prompt, PTuning
from fttrain import hub
from fttrain.adapters.frozen_weights import whole

SAVED = "prompt_embeddings"
"""PEFT's name for the saved tensor."""
ENCODER = "prompt_encoder.safetensors"
SMALL = 0.02


def _config(model: Any, adapter: Prefix | Prompt | PTuning) -> Any:
    options: dict[str, Any] = {"task_type": TaskType.CAUSAL_LM, "num_virtual_tokens": adapter.virtual_tokens}
    match adapter:
        case Prompt():
            return PromptTuningConfig(**options)
        case Prefix():
            width = adapter.hidden_size or model.config.hidden_size
            return PrefixTuningConfig(prefix_projection=adapter.projection, encoder_hidden_size=width, **options)
        case PTuning():
            if adapter.encoder == "lstm":
                options |= {"encoder_num_layers": adapter.encoder_layers, "encoder_dropout": adapter.encoder_dropout}
            return PromptEncoderConfig(
                encoder_reparameterization_type=adapter.encoder.upper(),
                encoder_hidden_size=adapter.hidden_size or model.config.hidden_size,
                **options,
            )


def _first_tokens(model: Any, adapter: Prompt) -> Tensor:
    """Return [virtual tokens, D]: embeddings of a text, repeated, or of tokens drawn from the vocabulary; or noise."""
    table, count = model.get_input_embeddings(), adapter.virtual_tokens
    if adapter.init == "text":
        ids = torch.tensor(_ids(model, adapter.text or ""))
        ids = ids.repeat(-(-count // len(ids)))[:count]
    else:
        ids = torch.randint(model.config.vocab_size, (count,))
    with torch.no_grad(), whole(table.weight):
        drawn = nn.functional.embedding(ids.to(table.weight.device), table.weight).float()
        return drawn if adapter.init != "random" else torch.randn_like(drawn) * table.weight.float().std()


def _ids(model: Any, text: str) -> list[int]:
    from transformers import AutoTokenizer

    folder = hub.tokenizer_folder(model.name_or_path, getattr(model.config, "_commit_hash", None))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return tokenizer(text, add_special_tokens=False).input_ids


def _go_on(encoder: nn.Module, start: Path) -> None:
    if (start / ENCODER).exists():
        encoder.load_state_dict(load_file(start / ENCODER))
    else:
        encoder.load_state_dict({"embedding.weight": load_file(start / "adapter_model.safetensors")[SAVED]})


def led(model: Any, ids_BT: Tensor, positions_BT: Tensor) -> tuple[dict[str, Any], int]:
    """Return the body's inputs for rows with virtual tokens before them, and how many positions those take."""
    # A prefix lives in the cache and takes no positions of the line; prompt embeddings are tokens of the line itself.
    config = model.active_peft_config
    count = config.num_virtual_tokens
    # oneDNN has no LSTM in bf16 for CPUs without bf16 instructions, and fails when it is called without gradients.
    with torch.backends.mkldnn.flags(enabled=False):
        prompt = model.get_prompt(len(ids_BT))
    if isinstance(config, PrefixTuningConfig):
        return {"input_ids": ids_BT, "position_ids": positions_BT + count, "past_key_values": prompt}, 0
    embedded_BTD = model.get_base_model().get_input_embeddings()(ids_BT)
    places = torch.arange(count, device=ids_BT.device).expand(len(ids_BT), count)
    return {
        "inputs_embeds": torch.cat([prompt.to(embedded_BTD.dtype), embedded_BTD], dim=1),
        "position_ids": torch.cat([places, positions_BT + count], dim=1),
    }, count


class Method:
    """What the three kinds do."""

    def __init__(self, adapter: Prefix | Prompt | PTuning, name: str, accumulation: int) -> None:  # noqa: ARG002 for AdaLoRA
        self.adapter = adapter
        self.name = name

    def attach(self, model: Any, start: Path | None, *, in_fp32: bool) -> Any:
        """The model in PEFT's wrapper, with an encoder of virtual tokens as trained weights."""
        wrapped: Any = get_peft_model(model, _config(model, self.adapter), adapter_name=self.name)
        encoder = wrapped.prompt_encoder[self.name]
        if start is not None:
            _go_on(encoder, start)
        elif isinstance(self.adapter, Prompt):
            with torch.no_grad():
                encoder.embedding.weight.copy_(_first_tokens(model, self.adapter))
        elif isinstance(self.adapter, Prefix) and not self.adapter.projection:
            nn.init.normal_(encoder.embedding.weight, std=SMALL)
        encoder.to(torch.float32 if in_fp32 else next(model.parameters()).dtype)
        return wrapped

    @torch.no_grad()
    def save(self, model: Any, weights: dict[str, Tensor], folder: Path) -> None:
        """Write the adapter as PEFT loads it, from the encoder's trained weights by their names in the model."""
        prefix = f"prompt_encoder.{self.name}."
        state = {key.removeprefix(prefix): weight.float() for key, weight in weights.items() if key.startswith(prefix)}
        config = copy.copy(model.peft_config[self.name])
        if len(state) == 1:
            made = state["embedding.weight"]
        else:
            config.inference_mode = False
            encoder = PromptEncoder(config) if isinstance(config, PromptEncoderConfig) else PrefixEncoder(config)
            encoder.load_state_dict(state)
            made = encoder.eval()(torch.arange(config.num_virtual_tokens)[None])[0]
        folder.mkdir(parents=True, exist_ok=True)
        save_file({SAVED: made.contiguous()}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        if len(state) > 1:
            save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / ENCODER)
        config.inference_mode = True
        config.save_pretrained(str(folder))

    def state(self, model: nn.Module, num_steps: int) -> None:
        """Return no state: trained weights are all there is."""
