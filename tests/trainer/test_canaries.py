"""Models that would run code are refused before they are loaded. Each brings a canary: a folder that it would make."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file
from tests.trainer.hub_cache import forget_opened
from tests.trainer.in_process import make_data, make_step, train

from ftlaunch.errors import UserError
from ftlaunch.recipe.model import Model
from ftlaunch.recipe.stages import Merge
from ftlaunch.run.layout import StageDir
from fttrain.data.sources import _open
from fttrain.merging.merge import find_source, merge
from fttrain.model.scorer import load_base, load_tokenizer
from fttrain.tools.chat import load as load_for_chat

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Payload:
    """Unpickled, it makes the canary."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self._canary),)


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code of the model was run"


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def bring_code(folder: Path, canary: Path) -> None:
    code = f"import os\nos.mkdir({str(canary)!r})\nfrom transformers import LlamaForCausalLM as Evil\n"
    (folder / "evil.py").write_text(code)


def with_remote_code(folder: Path, canary: Path) -> None:
    bring_code(folder, canary)
    change(folder / "config.json", model_type="evil", auto_map={"AutoModelForCausalLM": "evil.Evil"})


def with_tokenizer_code(folder: Path, canary: Path) -> None:
    bring_code(folder, canary)
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.Evil"]})


def cve_2026_4372(folder: Path, canary: Path) -> None:
    """A kernel to be fetched, named by what transformers keeps to itself."""
    bring_code(folder, canary)
    change(folder / "config.json", _attn_implementation_internal=f"{folder}/evil")


def cve_2026_5241(folder: Path, canary: Path) -> None:
    """A nested model that brings the permission along."""
    bring_code(folder, canary)
    part = {"model_type": "evil", "auto_map": {"AutoModel": "evil.Evil"}, "trust_remote_code": True}
    change(folder / "config.json", model_type="lightglue", keypoint_detector_config=part)


def pickled(folder: Path, canary: Path) -> None:
    """CVE-2025-32434 and CVE-2026-24747 went around weights_only: what is not opened cannot."""
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Payload(canary)}, folder / "pytorch_model.bin")


EVIL = [with_remote_code, with_tokenizer_code, cve_2026_4372, cve_2026_5241, pickled]


@pytest.mark.parametrize("make_evil", EVIL, ids=lambda make: make.__name__)
def test_a_model_that_would_run_code_is_refused(make_evil: Callable, folder: Path, canary: Path):
    make_evil(folder, canary)
    spec = Model(path=str(folder))
    with pytest.raises(UserError, match=r"has the key|the pickled"):
        load_base(spec, dtype=torch.float32, packing=False)
    with pytest.raises(UserError, match=r"has the key|the pickled"):
        load_for_chat(str(folder))
    if make_evil is not pickled:
        with pytest.raises(UserError, match="has the key"):
            load_tokenizer(str(folder))


def test_the_canaries_sing_where_they_are_let(tmp_path: Path, folder: Path):
    """Else the tests above would prove nothing."""
    bird = tmp_path / "bird"
    with_remote_code(folder, bird)
    change(folder / "config.json", model_type="llama")
    trusting = f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)"
    # In a process of its own: the foreign code marks transformers' own classes for good.
    subprocess.run([sys.executable, "-c", f"from transformers import AutoModelForCausalLM; {trusting}"], check=True)
    assert bird.exists()
    bird.rmdir()
    pickled(folder, bird)
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert bird.exists()


@pytest.fixture
def hub(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of owner/model in a hub cache, offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub/models--owner--model"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    snapshot.parent.mkdir()
    folder.rename(snapshot)
    return snapshot


def test_a_model_of_the_hub_is_judged_before_it_is_loaded_and_keeps_its_name(hub: Path, canary: Path):
    model = load_base(Model(path="owner/model"), dtype=torch.float32, packing=False)
    assert model.name_or_path == model.config.name_or_path == "owner/model"
    assert load_tokenizer("owner/model", COMMIT).eos_token == "<|im_end|>"
    with_remote_code(hub, canary)
    for revision in (None, "main", COMMIT):
        with pytest.raises(UserError, match="auto_map"):
            load_base(Model(path="owner/model", revision=revision), dtype=torch.float32, packing=False)
    with pytest.raises(UserError, match="auto_map"):
        load_for_chat("owner/model")


def test_pickled_weights_of_the_hub_need_leave_and_run_nothing_even_then(hub: Path, canary: Path):
    weights = load_file(hub / "model.safetensors")
    (hub / "model.safetensors").unlink()
    torch.save(weights, hub / "pytorch_model.bin")
    with pytest.raises(UserError, match="no safetensors can be had of owner/model"):
        load_base(Model(path="owner/model"), dtype=torch.float32, packing=False)
    allowed = Model(path="owner/model", revision=COMMIT, allow_pickle=True)
    model = load_base(allowed, dtype=torch.float32, packing=False)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(model.get_parameter(name), weights[name])
    torch.save({"weight": Payload(canary)}, hub / "pytorch_model.bin")
    with pytest.raises(UserError, match="no model could be loaded"):
        load_base(allowed, dtype=torch.float32, packing=False)


def test_an_adapter_is_no_base_as_its_own_would_be_loaded_unseen(folder: Path, canary: Path):
    with_remote_code(folder, canary)
    adapter = folder.with_name("adapter")
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    with pytest.raises(UserError, match="is an adapter, not a model"):
        load_base(Model(path=str(adapter)), dtype=torch.float32, packing=False)
    with pytest.raises(UserError, match="auto_map"):
        load_for_chat(str(adapter))


def test_a_data_sets_script_is_not_run(tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch):
    """The hub's data set owner/rows has a script."""
    forget_opened()
    fetched = tmp_path / ("1" * 40)
    fetched.mkdir()
    (fetched / "rows.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.hf_hub_download", lambda *_, filename, **__: str(fetched / filename))
    with pytest.raises(UserError, match="scripts are no longer supported") as refused:
        _open("owner/rows", None, "train", None, False)
    assert "never run" in refused.value.remedy


FETCHES_CODE = """\
import fttrain
from transformers.utils import is_kernels_available
assert not is_kernels_available()
import kernels
"""


def test_no_kernel_can_be_fetched_while_training_where_kernels_is_installed(tmp_path: Path, canary: Path):
    (tmp_path / "kernels.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-c", FETCHES_CODE]
    done = subprocess.run(command, env={"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert "import of kernels halted" in done.stderr


heard: list[tuple[str, str]] | None = None
"""(event, subject) of audited events while a test listens; a hook cannot be taken off again."""


def hear(event: str, arguments: tuple) -> None:
    if heard is None:
        return
    if event == "pickle.find_class":
        heard.append((event, ".".join(map(str, arguments))))
    elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        heard.append((event, os.fsdecode(arguments[0])))


sys.addaudithook(hear)


@pytest.fixture
def listening() -> Iterator[list[tuple[str, str]]]:
    global heard
    heard = []
    yield heard
    heard = None


PLANTED = ["optimizer.pt", "rng_state.pth", "training_args.bin", "scheduler.pt", "adapter_model.bin", "model.pkl"]
"""What the stock trainers unpickle on resume: CVE-2026-1839 is rng_state.pth."""


def plant(stage_dir: StageDir, canary: Path) -> list[str]:
    places = [stage_dir.path, stage_dir.checkpoints, *stage_dir.checkpoints.glob("step-*"), stage_dir.artifact]
    paths = [folder / name for folder in places for name in PLANTED]
    for path in paths:
        path.write_bytes(pickle.dumps(Payload(canary)))
    return list(map(str, paths))


def test_nothing_is_unpickled_in_training_resume_and_merge(
    tmp_path: Path, tiny_model: Path, rows_file: Path, canary: Path, listening: list[tuple[str, str]]
):
    step = make_step(tiny_model, make_data(rows_file))
    folder = train(step, tmp_path / "run")
    shutil.rmtree(max(folder.checkpoints.glob("step-*")))  # so that there is something left to train
    planted = plant(folder, canary)
    before = len(listening)
    train(step, tmp_path / "run")
    merge(find_source(folder.artifact), tmp_path / "merged", Merge())
    unpickled = [subject for event, subject in listening if event == "pickle.find_class"]
    opened = [subject for event, subject in listening[before:] if event == "open"]
    assert any(path.endswith("manifest.json") for path in opened), "the hook heard nothing"
    assert not set(opened) & set(planted)
    assert unpickled == []


def test_the_floors_shut_out_the_versions_with_known_holes():
    floors = {"torch": (2, 10), "transformers": (5, 3), "jinja2": (3, 1, 6)}
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    required = project["optional-dependencies"]["train"]
    for name, floor in floors.items():
        line = next(line for line in required if re.match(rf"{name}\b", line, re.IGNORECASE))
        asked = tuple(map(int, re.search(r">=([\d.]+)", line)[1].split(".")))
        assert asked >= floor
        assert tuple(map(int, re.findall(r"\d+", version(name))[:3])) >= floor
