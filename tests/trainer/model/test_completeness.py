"""A model whose files lack weights, or hold others than its config names, is not loaded."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftlaunch.errors import UserError
from ftlaunch.recipe.model import Model
from fttrain.model.scorer import load_base
from fttrain.ppo import rewards
from fttrain.tools import chat

UP = "model.layers.1.mlp.up_proj.weight"


def changed(tiny_model: Path, folder: Path, **tensors: torch.Tensor | None) -> Model:
    """The model with some tensors set, or removed where they are None."""
    shutil.copytree(tiny_model, folder)
    held = load_file(folder / "model.safetensors") | tensors
    save_file(
        {key: one for key, one in held.items() if one is not None}, folder / "model.safetensors", {"format": "pt"}
    )
    return Model(path=str(folder), dtype="fp32")


def load(spec: Model) -> None:
    load_base(spec, dtype=torch.float32, packing=False)


def test_missing_weights_are_named(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.layers\.\*\.mlp\.up_proj\.weight of the llama model are missing"):
        load(changed(tiny_model, tmp_path / "model", **{UP: None}))


def test_weights_of_other_shapes_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    spec = changed(tiny_model, tmp_path / "model", **{UP: torch.zeros(8, 64)})
    with pytest.raises(UserError, match=r"up_proj\.weight of the llama model have other shapes"):
        load(spec)


def test_weights_of_nothing_are_named(tiny_model: Path, tmp_path: Path) -> None:
    spec = changed(tiny_model, tmp_path / "model", **{"score.weight": torch.zeros(1, 64)})
    with pytest.raises(UserError, match=r"score\.weight in the files of .* belong to no part of a llama model"):
        load(spec)


def test_a_tower_is_left_out_with_a_word(tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    others = {"model.vision_tower.proj.weight": torch.zeros(4, 4), "mtp.layers.0.weight": torch.zeros(4)}
    with caplog.at_level(logging.WARNING):
        load(changed(tiny_model, tmp_path / "model", **others))
    assert "2 weights of parts that text does not go through" in caplog.text


def test_a_tied_head_may_be_on_disk_or_not(tiny_model: Path, tmp_path: Path) -> None:
    assert json.loads((tiny_model / "config.json").read_text())["tie_word_embeddings"]
    head = load_file(tiny_model / "model.safetensors")["model.embed_tokens.weight"].clone()
    load(changed(tiny_model, tmp_path / "model", **{"lm_head.weight": head}))
    load(Model(path=str(tiny_model), dtype="fp32"))


def test_a_model_to_talk_with_is_whole_too(tiny_model: Path, tmp_path: Path) -> None:
    spec = changed(tiny_model, tmp_path / "model", **{UP: None})
    with pytest.raises(UserError, match=r"up_proj\.weight of the llama model are missing"):
        chat.load(spec.path)


def test_a_reward_model_has_its_head(tiny_model: Path, tmp_path: Path) -> None:
    """The language model's head may be left over, and rates nothing."""
    folder = Path(changed(tiny_model, tmp_path / "model", **{"lm_head.weight": torch.zeros(4, 64)}).path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_labels": 1, "tie_word_embeddings": False}))
    with pytest.raises(UserError, match=r"score\.weight of the llama model are missing"):
        rewards._load_classifier(str(folder), None, torch.float32)
    held = load_file(folder / "model.safetensors")
    save_file(held | {"score.weight": torch.zeros(1, 64)}, folder / "model.safetensors", {"format": "pt"})
    assert rewards._load_classifier(str(folder), None, torch.float32).config.num_labels == 1


def test_a_family_without_a_causal_language_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    with pytest.raises(UserError, match="transformers has no causal language model of the family blip"):
        load(Model(path=str(tmp_path), dtype="fp32"))


def test_a_family_that_transformers_fails_to_build_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    spec = changed(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "cohere_compass_text", "num_hidden_layers": 1}')
    with pytest.raises(UserError, match="transformers fails to load the model of"):
        load(spec)
