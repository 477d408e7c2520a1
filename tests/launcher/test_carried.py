"""What jobs have of the submitting shell."""

import pytest

from ftlaunch.backend.slurm import submit


def test_variables_that_matter_travel_and_secrets_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "/scratch/hf")
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_person")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("SHELL_GAMES", "1")
    carried = submit.carried()
    assert carried["HF_HOME"] == "/scratch/hf"
    assert carried["NCCL_DEBUG"] == "INFO"
    assert {"HF_TOKEN", "SHELL_GAMES"}.isdisjoint(carried)
