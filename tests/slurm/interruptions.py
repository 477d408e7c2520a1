"""Interruptions of `run`, `resume`, `stop` and `cancel` at any moment: `make interruptions`, of which tests make a few.

Each trial takes a run of two scripted stages to where the verb makes sense, calls the verb as a user does on a site
whose sbatch, squeue and scancel take their time, and interrupts that at a moment drawn by a printed seed: Ctrl-C once
or twice, a lost terminal, SIGTERM, kill -9. Then squeue, asked without ftlaunch, is compared with what ftlaunch knows:

- every job that works in the run's folder is one that `status` names, or leaves by itself;
- no stage ever has two jobs on record that live, nor an attempt more than it should have;
- jobs of strangers, also in the run's folder or of the same name elsewhere, wait on as they did.

In the end the same call, made again, completes; the run is finished with the digest of a calm one.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from scheduled import ROOT, WORKER, devcluster, slurm
from tests.conftest import write_rows

from ftlaunch.backend.slurm.queue import read_job, read_submission
from ftlaunch.run.layout import RunDir

VERBS = ("run", "resume", "stop", "cancel")
BLOWS = ("kill -9", "Ctrl-C", "hang-up", "SIGTERM", "Ctrl-C twice")
STEPS, PACE = 30, 0.15
STRANGER_WITHIN = "notes"
"""Name of a job that its user has submitted by hand in the run's folder."""
LEAVE_SECONDS = 100.0
"""A job that is not on record may take so long to leave: it waits for a submission that may still go on."""
END_SECONDS = 240.0
POLL_SECONDS = 0.4
WHOLE = {"run": 4.5, "resume": 4.5, "stop": 2.5, "cancel": 2.5}
"""Seconds within which the blow falls, somewhat longer than a verb takes with a slow site."""
RECIPE = """\
name = "cut"
model = {{ path = "{model}", dtype = "fp32" }}
[data.q]
path = "{rows}"
prompt = "{{question}}"
completion = "{{answer}}"
[parallel]
strategy = "single"
device = "cpu"
[[stage]]
kind = "sft"
data = "q"
steps = 30
[[stage]]
kind = "sft"
data = "q"
steps = 30
"""
CONFIG = {"model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
CONFIG |= {"num_attention_heads": 2, "architectures": ["LlamaForCausalLM"]}
ACT = """\
#!/bin/sh
# As `accelerate launch --config_file F --machine_rank 0 -m fttrain STAGE`.
for stage; do :; done
exec {python} -S {worker} "$stage" {steps} {pace} none --machine_rank 0
"""
SLOW = '#!/bin/sh\nsleep "0.$(shuf -i 0-5 -n 1)"\n{real} "$@"; code=$?\nsleep "0.$(shuf -i 0-5 -n 1)"\nexit $code\n'


@dataclass(frozen=True)
class Site:
    """Where trials take place: a recipe, a profile, Python with an `accelerate` that acts, and slow commands."""

    folder: Path

    @property
    def slow(self) -> Path:
        return self.folder / "bin"

    def make(self) -> "Site":
        model, rows = self.folder / "model", write_rows(self.folder / "rows.jsonl")
        model.mkdir()
        (model / "config.json").write_text(json.dumps(CONFIG))
        (self.folder / "cut.toml").write_text(RECIPE.format(model=model, rows=rows))
        profile = (ROOT / "slurm/profiles/dev.toml").read_text()
        (self.folder / "site.toml").write_text(f'python = "{self._python()}"\n{profile}')
        self.slow.mkdir()
        for name in ("sbatch", "squeue", "scancel"):
            self._write(self.slow / name, SLOW.format(real=shutil.which(name)))
        return self

    def _python(self) -> Path:
        """An interpreter with our packages, in a folder where `accelerate` is the scripted one."""
        venv = self.folder / "venv"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
        packages = next(venv.glob("lib/python*/site-packages"))
        folders = "\n".join(path for path in sys.path if path.endswith("site-packages"))
        (packages / "ours.pth").write_text(f"{folders}\n")
        act = ACT.format(python=sys.executable, worker=WORKER, steps=STEPS, pace=PACE)
        self._write(venv / "bin/accelerate", act)
        return venv / "bin/python"

    @staticmethod
    def _write(file: Path, text: str) -> None:
        file.write_text(text)
        file.chmod(0o700)


@dataclass
class Trial:
    """One interruption of one verb."""

    site: Site
    number: int
    verb: str
    draw: random.Random
    told: list[str] = field(default_factory=list[str])
    """What was done, and what came of it."""

    @property
    def run(self) -> RunDir:
        return RunDir(self.site.folder / f"trial{self.number}")

    def make(self) -> str:
        """Take the trial, and say what was done. AssertionError where something is wrong."""
        with strangers(self.run.path) as theirs:
            before = self._prepare()
            self._interrupt()
            self._settle()
            self._finish()
            self._require_the_outcome(before)
            theirs()
        return f"trial {self.number}: {'; '.join(self.told)}"

    def words(self) -> list[str]:
        where = str(self.run.path)
        if self.verb == "run":
            site = str(self.site.folder / "site.toml")
            return ["run", str(self.site.folder / "cut.toml"), "--run-dir", where, "--cluster", site]
        return [self.verb, where]

    def _prepare(self) -> dict[str, int]:
        """Have the run where the verb makes sense: attempts of each stage by then."""
        if self.verb == "run":
            return {}
        waiting = self.verb != "resume" and self.draw.random() < 0.4
        started = Trial(self.site, self.number, "run", self.draw).words()
        self._must(*started, *(["--site", "sbatch.begin=now+1hour"] if waiting else []))
        self.told.append("waits" if waiting else "trains")
        if not waiting:
            wait_until(lambda: self._steps() >= 2)
        if self.verb == "resume":
            self._must("stop", str(self.run.path), "--wait", "60")
            wait_until(lambda: not in_queue(self.run.path))
        return {stage.name: len(stage.all_attempts()) for stage in self.run.stage_dirs()}

    def _interrupt(self) -> None:
        seconds = self.draw.uniform(0.0, WHOLE[self.verb])
        blow = BLOWS[self.number % len(BLOWS)]
        process = ftlaunch(*self.words(), path=self.site.slow)
        try:
            _, err = process.communicate(timeout=seconds)
            self.told.append(f"{self.verb} was over before {seconds:.2f} s")
        except subprocess.TimeoutExpired:
            strike(process, blow)
            _, err = process.communicate(timeout=120)
            self.told.append(f"{self.verb} met {blow} after {seconds:.2f} s: {process.returncode}")
        assert "Traceback" not in err or "KeyboardInterrupt" in err, err
        self.cut = process.returncode != 0
        self.killed = process.returncode == -signal.SIGKILL

    def _settle(self) -> None:
        """Whatever is in the queue is known, or leaves by itself."""
        if self.verb in ("run", "resume") and self.cut and not self.killed:
            wait_until(lambda: not in_queue(self.run.path), 30, self._standing)
        wait_until(lambda: in_queue(self.run.path) <= self._known(), LEAVE_SECONDS, self._standing)
        for stage in self.run.stage_dirs():
            job = read_job(stage)
            assert len(in_queue(self.run.path) & {*(job.ids if job else [])}) <= 1, self._standing()

    def _known(self) -> set[str]:
        """Jobs that ftlaunch shows."""
        if not self.run.plan.exists():
            return set()
        shown = json.loads(self._must("status", str(self.run.path), "--json"))
        return {stage["job"] for stage in shown["stages"] if stage["job"]}

    def _finish(self) -> None:
        """The same call again, and what it takes until the run is done."""
        if self.verb in ("stop", "cancel"):
            again = call(*self.words())
            assert again.returncode == 0 or "is not running" in again.stderr, again.stderr
            wait_until(lambda: not in_queue(self.run.path), 60, self._standing)
            state = json.loads(self._must("status", str(self.run.path), "--json"))["state"]
            assert state in ("stopped", "cancelled", "done"), self._standing()
            self.told.append(state)
        wait_until(self._is_taken, LEAVE_SECONDS, self._standing)
        wait_until(lambda: not in_queue(self.run.path), END_SECONDS, self._standing)

    def _is_taken(self) -> bool:
        """Whether the run is submitted, or done."""
        if all(stage.result.exists() for stage in self.run.stage_dirs()) and self.run.plan.exists():
            return True
        submission = read_submission(self.run)
        if submission and submission.complete and (alive := in_queue(self.run.path)) and alive <= self._known():
            return True
        for words in (["resume", str(self.run.path), "--cluster", str(self.site.folder / "site.toml")], None):
            done = call(*(words or Trial(self.site, self.number, "run", self.draw).words()))
            if done.returncode == 0:
                return True
            assert "Traceback" not in done.stderr, done.stderr
        return False

    def _require_the_outcome(self, before: dict[str, int]) -> None:
        digest = ""
        for step in range(1, STEPS + 1):
            digest = sha256(f"{digest}{step}".encode()).hexdigest()
        most = 1 if self.verb in ("run", "resume") else 2
        stages = self.run.stage_dirs()
        assert len(stages) == 2, self._standing()
        for stage in stages:
            assert json.loads(stage.result.read_text()) == {"digest": digest}, self._standing()
            made = len(stage.all_attempts()) - before.get(stage.name, 0)
            assert 0 <= made <= most, self._standing()

    def _steps(self) -> int:
        metrics = self.run.stage_dir("01-sft").metrics
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    def _must(self, *words: str) -> str:
        done = call(*words)
        assert done.returncode == 0, f"{words}: {done.stderr}\n{self._standing()}"
        return done.stdout

    def _standing(self) -> str:
        """All that tells what has become of the run."""
        rows = slurm("squeue", "--noheader", "--states=all", "--format=%i %T %r %j %Z").splitlines()
        mine = [row for row in rows if str(self.run.path) in row]
        files = [*self.run.path.glob("submission.json"), *self.run.path.glob("*/job.json"), *self._endings()]
        texts = [f"{file}: {file.read_text()}" for file in files]
        return "\n".join([f"trial {self.number}: {'; '.join(self.told)}", *mine, *texts])

    def _endings(self) -> Iterator[Path]:
        for stage in self.run.stage_dirs():
            yield from stage.path.glob("attempts/*/ended.json")
            yield from stage.path.glob("jobs/*_log.out")


def strike(process: "subprocess.Popen[str]", blow: str) -> None:
    if blow in ("SIGTERM", "kill -9"):
        process.send_signal(signal.SIGTERM if blow == "SIGTERM" else signal.SIGKILL)
        return
    for pause in (0.0, 0.2) if blow == "Ctrl-C twice" else (0.0,):
        time.sleep(pause)
        try:
            os.killpg(process.pid, signal.SIGHUP if blow == "hang-up" else signal.SIGINT)
        except ProcessLookupError:
            return


@contextmanager
def strangers(folder: Path) -> Iterator[Callable[[], None]]:
    """Jobs of the same user that are none of the run's, and what finds out whether they wait on as they did."""
    elsewhere = folder.with_name(f"{folder.name}-theirs")
    elsewhere.mkdir()
    ids: list[str] = []
    for name, place in (("mywork", elsewhere), ("cut/01-sft", elsewhere), (STRANGER_WITHIN, folder)):
        held = ["sbatch", "--parsable", "--hold", f"--job-name={name}", f"--chdir={place}", "--wrap=sleep 60"]
        ids.append(slurm(*held, "--output=/dev/null").strip())

    def look() -> None:
        rows = slurm("squeue", "--noheader", "--format=%i %T %r", f"--jobs={','.join(ids)}").splitlines()
        assert sorted(rows) == sorted(f"{id} PENDING JobHeldUser" for id in ids), rows

    try:
        yield look
    finally:
        slurm("scancel", *ids)
        left = in_queue(folder)
        slurm("scancel", *left)


def in_queue(folder: Path) -> set[str]:
    """Ids of jobs that wait or run in a run's folder, but for a stranger's, asked without ftlaunch."""
    rows = (row.split(" ", 2) for row in slurm("squeue", "--noheader", "--format=%i %j %Z").splitlines())
    return {id for id, name, place in rows if place == str(folder) and name != STRANGER_WITHIN}


def ftlaunch(*words: str, path: Path | None = None) -> "subprocess.Popen[str]":
    """The command line, in a session of its own, with a folder of other programs in front."""
    variables = os.environ | ({"PATH": f"{path}:{os.environ['PATH']}"} if path else {})
    command = [sys.executable, "-m", "ftlaunch", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=variables, stdout=pipe, stderr=pipe, text=True, start_new_session=True, preexec_fn=_heed_signals
    )


def _heed_signals() -> None:
    """A test in the background has them ignored, and what it starts inherits that."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def call(*words: str) -> "subprocess.CompletedProcess[str]":
    process = ftlaunch(*words)
    out, err = process.communicate(timeout=180)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def wait_until(holds: Callable[[], bool], seconds: float = 90.0, told: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, told()
        time.sleep(POLL_SECONDS)


def make_trials(folder: Path, count: int, seed: int, at_once: int) -> Iterator[str]:
    """Take so many trials, verb after verb, some at once; what was done in each, or what is wrong."""
    site = Site(folder).make()
    trials = [Trial(site, n, VERBS[n % len(VERBS)], random.Random(f"{seed} {n}")) for n in range(count)]
    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(trial.make) for trial in trials]
        for future in futures:
            error = future.exception()
            yield f"WRONG: {error}" if error else future.result()


def main() -> int:
    """Print what became of each trial; 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="interruptions", description=__doc__)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--at-once", type=int, default=4)
    wanted = parser.parse_args()
    print(f"seed {wanted.seed}, {wanted.trials} trials", flush=True)
    assert devcluster("up", "--nodes", "3").returncode == 0
    folder = Path(tempfile.mkdtemp(prefix="ftlaunch-interruptions-"))
    wrong = 0
    for told in make_trials(folder, wanted.trials, wanted.seed, wanted.at_once):
        wrong += told.startswith("WRONG")
        print(told, flush=True)
    print(f"{wanted.trials - wrong} of {wanted.trials} right{f'; see {folder}' if wrong else ''}")
    if not wrong:
        shutil.rmtree(folder)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
