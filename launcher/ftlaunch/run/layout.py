"""A run on disk: every path that launcher and trainer share, whichever backend starts the run."""

import shlex
from pathlib import Path

import msgspec
from msgspec import Struct

from ftlaunch.run.files import temporary_path, write_json
from ftlaunch.run.spec import StageSpec

REWARD_HEAD = "head.safetensors"
"""A file in each folder with a reward model, artifact or merged: `score.weight` [1, D]."""


CARD = "artifact.json"
"""A file in each artifact: what base it belongs to, and what was made of it."""


ATTEMPT = "FTLAUNCH_ATTEMPT"
"""Variable of a rank with its attempt's absolute folder, links resolved."""
NODE_FOLDER = "FTLAUNCH_NODE_FOLDER"
"""Variable that names a folder of this node, in memory or on a local disk, for as long as an attempt lives."""


SAVE_FAILURE = "save_failure.json"


class Attempt:
    """One start of a step's processes, as one of its nodes sees it; the first node is 0."""

    def __init__(self, path: Path, node: int = 0) -> None:
        self.path = path
        self.number = int(path.name)
        self.node = node
        # launch.log on the first node, launch1.log on the second, …
        self.launch_log = path / f"launch{node or ''}.log"
        """What `accelerate launch` itself said on this node."""
        self.process = path / f"process{node or ''}.json"
        """Host, pid and start time of the launching process on this node."""
        self.error = path / "error.json"
        """The first error of any rank: rank, type, message, traceback, log."""
        self.stopped = path / "stopped.json"
        """Written when all ranks saved and left on request: the reason and the step."""
        self.pace = path / "pace.json"
        """How long each rank works at a step by itself, as it was measured last."""
        self.local: Path | None = None
        """A folder of this node alone, while the attempt lives here."""

    @property
    def stage_dir(self) -> "StageDir":
        return StageDir(self.path.parent.parent)

    def rank_log(self, rank: int) -> Path:
        return self.path / f"rank{rank}.log"

    def on_node(self, node: int) -> "Attempt":
        """The same attempt as another node sees it."""
        return Attempt(self.path, node)

    def launch_logs(self) -> dict[str, Path]:
        """What `accelerate launch` said on each node so far, the first node's as "launch"."""
        # By number: as texts, launch10.log comes before launch2.log.
        others = sorted(self.path.glob("launch[1-9]*.log"), key=lambda path: int(path.stem.removeprefix("launch")))
        return {"launch": self.path / "launch.log"} | {f"launch, node {path.stem[6:]}": path for path in others}

    def beat(self, rank: int) -> Path:
        """Touched by a rank as it begins steps."""
        return (self.local or self.path) / f"rank{rank}.beat"

    def rank_logs(self) -> dict[int, Path]:
        """Logs by rank, in order."""
        found = {int(path.stem.removeprefix("rank")): path for path in self.path.glob("rank*.log")}
        return dict(sorted(found.items()))


REQUEUE, CANCEL, STOP = "requeue", "cancel", "asked"
"""What a stop file may say: the stage goes on later by itself; nothing is saved. Anything else: somebody stopped it."""


class StageDir:
    """The folder of one stage of one run, such as `01-sft`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        # "01-sft" → "sft".
        self.kind = path.name.partition("-")[2]
        self.step = path / "step.json"
        self.accelerate = path / "accelerate.yaml"
        self.deepspeed = path / "deepspeed.json"
        self.precision = path / "precision.json"
        """The number format that the stage computes in, and why, where its recipe says "auto"."""
        self.attempts = path / "attempts"
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples.jsonl"
        """Answers with their scores, of a PPO stage."""
        self.evaluation = path / "evaluation.json"
        """`rows`: of each row held out its cross-entropy and trained tokens, as the newest evaluation found them."""
        self.tracked = path / "tracked.json"
        """How far experiment trackers were sent the metrics."""
        self.predictions = path / "predictions.jsonl"
        """The predictions of an evaluate stage: prompts with references, answers and their scores."""
        self.preparing = path / "preparing.json"
        """How far a stage is with its rows, before its first step."""
        self.probe = path / "probe.json"
        """What was found before the first step: in which layout rows are computed, why, and how well it agrees."""
        self.checkpoints = path / "checkpoints"
        self.save_failure = path / SAVE_FAILURE
        """Why checkpoints are not written, while they are not."""
        self.artifact = path / "artifact"
        self.model = path / "model"
        """Where a merge stage puts the merged model."""
        self.result = path / "result.json"
        """Written last: without it the stage has not finished."""
        self.stop = path / "stop"
        """While this file exists, ranks save at the next optimizer step and leave."""

    @property
    def run(self) -> "RunDir":
        return RunDir(self.path.parent)

    def stop_reason(self) -> str | None:
        """What the stop file says; None where there is none."""
        try:
            return self.stop.read_text()
        except FileNotFoundError:
            return None

    def read_spec(self) -> StageSpec:
        return msgspec.json.decode(self.step.read_bytes(), type=StageSpec)

    def all_attempts(self) -> list[Attempt]:
        """Attempts so far, oldest first."""
        if not self.attempts.is_dir():
            return []
        # The folder also holds `latest`, and attempts that are still being made, such as `.3.5f0c…`.
        numbers = sorted(int(path.name) for path in self.attempts.iterdir() if path.name.isdigit())
        return [Attempt(self.attempts / str(number)) for number in numbers]

    def new_attempt(self, **contents: Struct) -> Attempt:
        """Make the folder of the next attempt, with a file NAME.json for each of `contents`; point `latest` to it."""
        number = len(self.all_attempts()) + 1
        attempt = Attempt(self.attempts / str(number))
        # By rename, so that nobody finds the attempt without its files.
        making = temporary_path(attempt.path)
        making.mkdir(mode=0o700, parents=True)
        for name, content in contents.items():
            write_json(making / f"{name}.json", content)
        making.rename(attempt.path)
        # A link cannot be changed in place, and `latest` must lead somewhere at any moment.
        partial = self.attempts / ".latest"
        partial.unlink(missing_ok=True)
        partial.symlink_to(str(number))
        partial.replace(self.attempts / "latest")
        return attempt


class RunDir:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.toml"
        self.resolved = path / "resolved.json"
        self.plan = path / "plan.json"
        self.provenance = path / "provenance.json"
        self.commits = path / "commits.json"
        """The commits of the data sets and bases of the hub that the run began with."""
        self.report = path / "report"
        """The page that `ftlaunch report` makes of the run, and what belongs to it."""
        self.lock = path / "lock"
        """Locked by the process that drives the run, and names it."""
        self.driver_log = path / "driver.log"
        """What the driver of a detached run said."""
        self.code = path / "code"
        """A copy of the project, where the run's stages read the files that it names there."""
        self.code_index = path / "code.json"
        """Which file of the project lies where in `code`."""

    @property
    def in_shell(self) -> str:
        """The path as a shell reads it, for commands that are printed."""
        return shlex.quote(str(self.path))

    def stage_dir(self, name: str) -> StageDir:
        return StageDir(self.path / name)

    def stage_dirs(self) -> list[StageDir]:
        """Step folders in the order in which they run."""
        # With two digits the order of names is the order of stages: 02 before 10.
        return [StageDir(path) for path in sorted(self.path.glob("[0-9][0-9]-*")) if path.is_dir()]

    def unfinished(self) -> list[StageDir]:
        """Those that have no result yet, in the order in which they run."""
        return [stage_dir for stage_dir in self.stage_dirs() if not stage_dir.result.exists()]
