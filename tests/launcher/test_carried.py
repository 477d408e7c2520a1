"""What jobs have of the submitting shell."""

import pytest

from ftlaunch.backend.slurm.carried import carried, not_heeded


def test_variables_that_matter_travel_and_secrets_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "/scratch/hf")
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_person")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("SHELL_GAMES", "1")
    plain = {"PYTORCH_CUDA_ALLOC_CONF", "UCX_TLS", "FI_PROVIDER", "WANDB_PROJECT", "SSL_CERT_FILE"}
    for name in (*plain, "WANDB_API_KEY"):
        monkeypatch.setenv(name, "x")
    found = carried()
    assert plain <= {*found}
    assert found["HF_HOME"] == "/scratch/hf"
    assert found["NCCL_DEBUG"] == "INFO"
    assert {"HF_TOKEN", "SHELL_GAMES", "WANDB_API_KEY"}.isdisjoint(found)


def test_what_sbatch_would_heed_of_the_shell_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not_heeded() is None
    monkeypatch.setenv("SBATCH_ACCOUNT", "physics")
    assert not_heeded() == "SBATCH_ACCOUNT of this shell is not heeded: say it in the profile, or by --site"
