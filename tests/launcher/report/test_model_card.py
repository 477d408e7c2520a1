"""The card of what a run has made: true to its records, valid for the hub, silent on this machine."""

from pathlib import Path

import pytest
from tests.launcher.report import test_report as told

from ftlaunch.report import model_card
from ftlaunch.report.facts import read_run
from ftlaunch.run.layout import RunDir

run = told.run


@pytest.fixture
def made(run: RunDir) -> RunDir:
    """A finished run with an adapter and a merged model."""
    told.finish(run)
    for folder in (run.stage_dir("01-sft").artifact, run.stage_dir("02-merge").model):
        folder.mkdir()
    (run.stage_dir("01-sft").artifact / "adapter_config.json").write_text("{}")
    return run


def test_each_model_gets_a_card_that_the_hub_understands(made: RunDir) -> None:
    from huggingface_hub import ModelCard

    adapter, model = model_card.write_cards(made, read_run(made))
    card = ModelCard(adapter.read_text())
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["ftlaunch", "sft"]
    assert ModelCard(model.read_text()).data.library_name == "transformers"
    assert "47 of 50 rows, 900 tokens" in card.text
    assert "| 01-sft | loss, held out | 1.25 |" in card.text
    assert "| 01-sft | loss of the last step | 1 |" in card.text
    assert "KL from the adapter model" in model.read_text()


def test_no_place_on_this_machine_is_told(made: RunDir) -> None:
    for path in model_card.write_cards(made, read_run(made)):
        assert str(made.path.parent) not in path.read_text()
        assert "/tmp" not in path.read_text()


def test_a_card_that_a_person_has_written_stays(made: RunDir) -> None:
    own = made.stage_dir("01-sft").artifact / "README.md"
    own.write_text("# Mine\n")
    assert [path.parent.name for path in model_card.write_cards(made, read_run(made))] == ["model"]
    assert own.read_text() == "# Mine\n"
    own.write_text("---\nbase_model: x\n---\n[More Information Needed]\n")
    assert len(model_card.write_cards(made, read_run(made))) == 2


@pytest.mark.parametrize(
    ("path", "licence"),
    [("meta-llama/Llama-2-7b-hf", "llama2"), ("google/gemma-2b", "gemma"), ("owner/model", None)],
)
def test_licences_are_known_of_well_known_bases(path: str, licence: str | None) -> None:
    assert model_card.licence_of(path) == licence


def test_a_local_base_has_the_licence_of_its_own_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    assert model_card.licence_of(str(tmp_path)) == "apache-2.0"
    (tmp_path / "README.md").write_text("license: mit\n")
    assert model_card.licence_of(str(tmp_path)) is None
