"""What a settled name loads: a hub id the hub's model, whatever folder of that name the working directory holds."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from tests.trainer.hub_cache import without_network
from transformers import AutoConfig, LlamaForSequenceClassification

from ftlaunch.errors import BAD_INPUT, UserError
from ftlaunch.recipe.adapter import Prompt
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.model import Model
from ftlaunch.run.layout import CARD, REWARD_HEAD
from ftlaunch.tools import QuantizeOptions, SuperweightsOptions
from fttrain import adapters, hub
from fttrain.data.sources import load_rows
from fttrain.evaluation.scoring import load_metric
from fttrain.merging import weight_map
from fttrain.merging.merge import find_source
from fttrain.model.scorer import load_base, load_tokenizer
from fttrain.ppo.rewards import load_reward_model
from fttrain.tools import chat, quantize, superweights

COMMIT = "1" * 40
NAMES = ("owner/model", "model")
READ = (REWARD_HEAD, CARD, "config.json", "adapter_config.json", "tokenizer_config.json", "model.safetensors")


@pytest.fixture
def hub_of_all(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the hub, offline, that holds NAMES and a classifier; in the working directory nothing can be read."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    judge = tmp_path / "judge"
    shutil.copytree(tiny_model, judge)
    LlamaForSequenceClassification(AutoConfig.from_pretrained(tiny_model, num_labels=1)).save_pretrained(judge)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name, folder in {**dict.fromkeys(NAMES, tiny_model), "owner/judge": judge}.items():
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs/main").write_text(COMMIT)
        shutil.copytree(folder, repository / "snapshots" / COMMIT)
        Path(name).mkdir(parents=True)
        for file in READ:
            (Path(name) / file).write_text("what nobody may read")


def of_peft_adapter(name: str) -> Path:
    Path("adapter").mkdir()
    config = {"base_model_name_or_path": name, "revision": COMMIT}
    (Path("adapter") / "adapter_config.json").write_text(json.dumps(config))
    return weight_map.folder_of(find_source(Path("adapter")).base)


LOADED_BY: dict[str, Callable[[str], Any]] = {
    "chat, eval, serve": lambda name: chat.load(name),
    "at a revision": lambda name: chat.load(f"{name}@{COMMIT}"),
    "training": lambda name: load_base(Model(path=name), dtype=torch.float32, packing=True),
    "preview": load_tokenizer,
    "quantize": lambda name: quantize.quantize(QuantizeOptions(model=name, out="out", granularity="channel")),
    "superweights": lambda name: [*superweights.main(SuperweightsOptions(model=name))],
    "merge, of an adapter of PEFT's": of_peft_adapter,
}


@pytest.mark.usefixtures("hub_of_all")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("verb", LOADED_BY)
def test_a_folder_of_a_hub_id_s_name_in_the_working_directory_changes_nothing(verb: str, name: str):
    assert LOADED_BY[verb](name) not in (None, BAD_INPUT)


@pytest.mark.usefixtures("hub_of_all")
def test_nor_does_one_of_a_reward_model_s_name():
    def load(revision: str | None) -> Any:
        judge, policy = Model(path="owner/judge", revision=revision), torch.nn.Linear(1, 1)
        return load_reward_model(judge, policy, Model(path="owner/model"), (), dtype=torch.float32, in_fp32=True)

    assert load(None).config.num_labels == load(COMMIT).config.num_labels == 1
    with pytest.raises(UserError, match="no sequence classifier could be loaded from owner/judge"):
        load("0" * 40)


@pytest.mark.usefixtures("hub_of_all")
def test_nor_does_one_of_a_data_set_s_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    without_network(monkeypatch, tmp_path / "copies")
    Path("owner/rows").mkdir()
    Path("owner/rows/train.jsonl").write_text('{"text": "a row of nobody"}\n')
    with pytest.raises(UserError, match="the data set 'owner/rows' cannot be had"):
        list(load_rows(Data(path="owner/rows", format="text")))
    assert Path("owner/rows").exists(), "the working directory is what it was"


@pytest.mark.usefixtures("hub_of_all")
def test_nor_does_one_of_a_metric_s_name_whose_code_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path / "modules"))
    Path("owner/metric").mkdir()
    Path("owner/metric/metric.py").write_text(f"open({str(tmp_path / 'bird')!r}, 'w')")
    with pytest.raises(UserError, match=f"the metric owner/metric@{COMMIT} cannot be loaded"):
        load_metric(f"owner/metric@{COMMIT}")
    assert not (tmp_path / "bird").exists()


@pytest.mark.usefixtures("hub_of_all")
def test_the_text_of_virtual_tokens_is_tokenized_at_the_model_s_revision(tmp_path: Path):
    model = load_base(Model(path="owner/model", revision=COMMIT), dtype=torch.float32, packing=False)
    (tmp_path / "hub/models--owner--model/refs/main").write_text("2" * 40)  # a newer revision, which is not at hand
    adapter = Prompt(virtual_tokens=2, init="text", text="hi")
    assert adapters.attach(model, adapter, None, in_fp32=True) is not None


@pytest.mark.usefixtures("hub_of_all")
def test_an_absolute_path_is_the_folder(tiny_model: Path):
    assert hub.model_folder(str(tiny_model)) == tiny_model.resolve()
    with pytest.raises(UserError, match="there is no folder /nowhere/model"):
        hub.model_folder("/nowhere/model")


@pytest.mark.usefixtures("hub_of_all")
@pytest.mark.parametrize("name", ["./model", "../here/model", "a/b/c", "", None])
def test_an_adapter_whose_base_counted_from_a_folder_that_nobody_knows_is_refused(name: str | None):
    Path("adapter").mkdir()
    (Path("adapter") / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": name}))
    with pytest.raises(UserError, match="does not say where the base is") as refused:
        find_source(Path("adapter"))
    assert "write the base's absolute path there, or its hub id" in refused.value.remedy


@pytest.mark.usefixtures("hub_of_all")
@pytest.mark.parametrize("file", ["adapter_config.json", CARD])
def test_an_adapter_whose_base_has_moved_says_where_it_was_and_follows_what_is_written_instead(
    file: str, tmp_path: Path, tiny_model: Path
):
    Path("adapter").mkdir()
    gone, found = tmp_path / "gone", str(tiny_model)
    card = {"base": {"path": str(gone)}, "adapter": {"kind": "lora"}, "base_model_name_or_path": str(gone)}
    Path("adapter", file).write_text(json.dumps(card))
    with pytest.raises(UserError, match=f"the base of the adapter in adapter is not in {gone}") as refused:
        find_source(Path("adapter"))
    assert refused.value.remedy.endswith(f"write its new absolute path into adapter/{file}")
    Path("adapter", file).write_text(json.dumps(card).replace(str(gone), found))
    assert find_source(Path("adapter")).base.path == found


@pytest.mark.usefixtures("hub_of_all")
def test_a_hub_id_that_cannot_be_had_is_told_how_a_folder_is_written():
    with pytest.raises(UserError, match="no model could be loaded from owner/none") as refused:
        chat.load("owner/none")
    assert "a folder is written ./owner/none" in refused.value.remedy
