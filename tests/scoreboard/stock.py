"""Trials that fit one stock stack only: what it keeps of secrets, and what submitit does with values and pickles."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

from tests.scoreboard.child import outcome
from tests.scoreboard.saves import Payload
from tests.scoreboard.trainer import TrainerSaver
from tests.scoreboard.trial import Verdict

CANARY = "hf_ScoreboardCanary0123456789abcdef"


def holding(folder: Path) -> list[str]:
    """Names of the files that hold the canary."""
    found = [path for path in folder.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]
    return sorted({path.name for path in found})


def trainer_secret(work: Path) -> Verdict:
    """The token is where Trainer wants it: TrainingArguments.hub_token."""
    said = outcome(lambda: TrainerSaver().train(work / "run", stop_at=2), work / "run", CANARY=CANARY)
    assert "Stopped" in said["error"], said
    if places := holding(work / "run/out"):
        return Verdict("FAIL", f"hub_token is in {', '.join(places)} of every checkpoint")
    return Verdict("pass", "hub_token is in no file of a checkpoint")


PDSH = """#!/bin/sh
printf '%s\\n' "$@" > {seen}
"""


def deepspeed_secret(work: Path) -> Verdict:
    """A shim in the place of pdsh notes its arguments; the token is where DeepSpeed wants it: .deepspeed_env."""
    shim, seen, hosts = work / "bin/pdsh", work / "seen", work / "hosts"
    shim.parent.mkdir()
    shim.write_text(PDSH.format(seen=seen))
    shim.chmod(0o755)
    hosts.write_text("n1 slots=1\nn2 slots=1\n")
    (work / ".deepspeed_env").write_text(f"HF_TOKEN={CANARY}\n")
    command = [sys.executable, "-c", "from deepspeed.launcher.runner import main; main()", "--hostfile", str(hosts)]
    command += ["--no_ssh_check", "--master_addr", "n1", "train.py"]
    environment = os.environ | {"PATH": f"{shim.parent}:{os.environ['PATH']}", "HOME": str(work)}
    done = subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True, check=False)
    assert seen.exists(), done.stdout + done.stderr
    if CANARY in seen.read_text():
        return Verdict("FAIL", "a value of .deepspeed_env is in the command line of pdsh, on every host")
    return Verdict("pass", "in no command line")


def submitit_newline(work: Path) -> Verdict:
    from submitit.slurm.slurm import _make_sbatch_string

    canary = work / "canary"
    text = _make_sbatch_string("true", work, comment=f"a\ntouch {canary} #", use_srun=False)
    (work / "script").write_text(text)
    subprocess.run(["bash", work / "script"], check=False, capture_output=True)
    return Verdict("FAIL", "bash ran it") if canary.exists() else Verdict("pass", "not run")


def submitit_pickle(work: Path) -> Verdict:
    """What a job's processes load is replaced between submission and start."""
    canary = work / "canary"
    (work / "1_submitted.pkl").write_bytes(pickle.dumps(Payload(canary)))
    job = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "1", "SUBMITIT_LOCAL_NTASKS": "1"}
    ranks = {"SUBMITIT_LOCAL_LOCALID": "0", "SUBMITIT_LOCAL_GLOBALID": "0", "SUBMITIT_LOCAL_NODEID": "0"}
    command = [sys.executable, "-m", "submitit.core._submit", str(work)]
    done = subprocess.run(command, env=os.environ | job | ranks, capture_output=True, text=True, check=False)
    if canary.exists():
        return Verdict("FAIL", "the payload ran (a job is a pickle in a folder)")
    return Verdict("pass", f"not run: {(done.stdout + done.stderr).strip().splitlines()[-1][:80]}")


def fail_with_everything() -> None:
    raise RuntimeError(f"cannot sign in with {dict(os.environ)}")


def submitit_secret(work: Path) -> Verdict:
    """A job fails with its environment in the error."""
    import submitit

    os.environ["HF_TOKEN"] = CANARY
    try:
        executor = submitit.LocalExecutor(work)
        executor.update_parameters(timeout_min=2)
        executor.submit(fail_with_everything).exception()
    finally:
        del os.environ["HF_TOKEN"]
    if places := holding(work):
        kinds = sorted({name.partition("_")[2] for name in places})
        return Verdict("FAIL", f"an error with the environment in it is in *_{', *_'.join(kinds)} as it was")
    return Verdict("pass", "in no file")
