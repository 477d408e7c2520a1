"""A folder with a causal language model → the sequence classifier with one label that a reward model is."""

import inspect
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ftlaunch.errors import UserError
from ftlaunch.run.files import write_json
from ftlaunch.run.layout import REWARD_HEAD
from ftlaunch.safety.model_files import INDEX, WEIGHTS


def architecture(model_type: str) -> str:
    """transformers' class of a sequence classifier on this kind of body.

    Raises UserError where there is none, or where it reads more than the last token's hidden state.
    """
    import transformers
    from transformers.modeling_layers import GenericForSequenceClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES

    remedy = "use a base of another family, such as llama, qwen2, mistral or gemma"
    if model_type not in NAMES:
        raise UserError(f"transformers has no sequence classifier on a {model_type} model", remedy)
    names = NAMES[model_type]
    name = names if isinstance(names, str) else names[0]
    kind = getattr(transformers, name)
    # `score` is the name of the one linear layer of classifiers that read the last token, as RewardModel does.
    if not issubclass(kind, GenericForSequenceClassification) and "self.score = " not in inspect.getsource(kind):
        raise UserError(f"{name} does not classify by the last token alone, as a reward model does", remedy)
    return name


def make(folder: Path, tokenizer: Any) -> None:
    """Join the body in `folder`, a model saved without its language-model head, and the reward head to one model."""
    pad = padding(tokenizer, tokenizer.chat_template)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "architectures": [architecture(config["model_type"])],
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
        "pad_token_id": pad,
    }
    write_json(folder / "config.json", config)
    tokenizer.save_pretrained(folder)
    _add_shard(folder)


def _add_shard(folder: Path) -> None:
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text())
    else:
        body = folder / "model-00001-of-00001.safetensors"
        (folder / WEIGHTS).rename(body)  # a file of the plain name would be read alone
        index = {"metadata": {"total_size": body.stat().st_size}, "weight_map": _map(body)}
    index["weight_map"] |= _map(folder / REWARD_HEAD)
    index["metadata"]["total_size"] += (folder / REWARD_HEAD).stat().st_size
    write_json(folder / INDEX, index)


def _map(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as shard:
        return dict.fromkeys(shard.keys(), file.name)


def padding(tokenizer: Any, template: str | None) -> int:
    """Return a padding token that ends no answer: transformers reads the reward at the last other token.

    Raises UserError where the tokenizer has none.
    """
    ends = {tokenizer.eos_token_id}
    if template:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
        ends.add(tokenizer.apply_chat_template(turns, chat_template=template, return_dict=False)[-1])
    named = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id)
    special = sorted(token for token, added in tokenizer.added_tokens_decoder.items() if added.special)
    for token in (*named, *special):
        if token is not None and token not in ends:
            return token
    raise UserError(
        "the tokenizer has no special token except the one that ends answers, and a reward model needs one for padding",
        'add one to the base: tokenizer.add_special_tokens({"pad_token": "<|pad|>"}), then'
        " model.resize_token_embeddings(len(tokenizer)), and save both",
    )
