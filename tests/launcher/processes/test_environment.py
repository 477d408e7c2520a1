"""What the trainer's processes inherit, and what they do not."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ftlaunch.backend.slurm.carried import carried
from ftlaunch.processes.environment import inherited

FOREIGN = (
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK ROLE_WORLD_SIZE NODE_RANK MASTER_ADDR MASTER_PORT"
    " TORCHELASTIC_RUN_ID PET_NNODES OMPI_COMM_WORLD_SIZE PMI_SIZE PMIX_RANK MPI_LOCALRANKID MV2_COMM_WORLD_LOCAL_RANK"
    " ACCELERATE_GRADIENT_ACCUMULATION_STEPS ACCELERATE_USE_DEEPSPEED FSDP_VERSION DS_ACCELERATOR DEEPSPEED_TIMEOUT"
)
OUR_OWN = (
    "HOME HF_HOME CUDA_VISIBLE_DEVICES OMP_NUM_THREADS TORCH_ELASTIC_SHUTDOWN_TIMEOUT DS_BUILD_OPS NCCL_DEBUG FRANK"
)


@pytest.mark.parametrize("name", FOREIGN.split())
def test_what_another_launcher_has_left_is_not_inherited(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, "2")
    assert name not in inherited()


@pytest.mark.parametrize("name", OUR_OWN.split())
def test_what_the_user_has_set_is_inherited(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, "/2")
    assert inherited()[name] == "/2"


@pytest.mark.parametrize("seen_by", [inherited, carried])
def test_relative_paths_in_variables_count_from_here_in_a_run_s_folder_too(
    seen_by: Callable[[], dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", "cache")
    monkeypatch.setenv("HF_HUB_CACHE", "~/hub")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/lib::../lib")
    monkeypatch.setenv("HF_ENDPOINT", "hub")
    found = seen_by()
    assert found["HF_HOME"] == str(tmp_path / "cache")
    assert found["HF_HUB_CACHE"] == "~/hub"
    assert found["LD_LIBRARY_PATH"] == f"/lib::{tmp_path}/../lib"
    assert found["HF_ENDPOINT"] == "hub"
