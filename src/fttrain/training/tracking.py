"""Metrics for experiment trackers, through accelerate: each step once, however often a run was killed and resumed.

metrics.jsonl is the truth. When a stage starts again, a tracker gets the lines that it lacks and no line twice:
TensorBoard's files belong to the run and are written again as a whole; for the others, which keep what they received,
`tracked.json` remembers the newest line.
"""

import json
import logging
import uuid
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from ftlaunch.errors import UserError
from ftlaunch.recipe.track import Track
from ftlaunch.run.files import file_by_rename, read_jsonl
from ftlaunch.run.layout import StageDir
from ftlaunch.run.spec import StageSpec

log = logging.getLogger(__name__)

PACKAGES = {"comet": "comet_ml"}
"""Tracker → its package, where the names differ."""
NAMES = {"rewards/margin": "rewards/margins", "rewards/accuracy": "rewards/accuracies"}
"""Our keys → the names that TRL and most dashboards use."""
LEFT_OUT = ("step", "steps", "time")

Place = tuple[int, bool]
"""A line of metrics.jsonl: its step, and whether it is an evaluation."""


def require_installed(track: Track) -> None:
    """Raise UserError where a tracker's package is not installed: before a model is loaded."""
    for name in track.to:
        package = PACKAGES.get(name, name)
        if find_spec(package) is None:
            raise UserError(f"track.to names {name}, and {package} is not installed", f"pip install {package}")


def place_of(line: dict[str, Any]) -> Place:
    """Return a line's place in the order of metrics.jsonl: a step's evaluation comes after its training."""
    return line["step"], "loss" not in line


def named(line: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a line under the usual names: `train/loss`, `eval/loss`, `train/rewards/margins`."""
    found: dict[str, float] = {}
    for key, value in line.items():
        if key not in LEFT_OUT and isinstance(value, int | float):
            part, bare = ("eval", key.removeprefix("eval/")) if key.startswith("eval/") else ("train", key)
            found[f"{part}/{NAMES.get(bare, bare)}"] = value
    return found


class Trackers:
    """All trackers of a stage; on the main rank only, elsewhere and without [track] they do nothing."""

    def __init__(self, spec: StageSpec, folder: StageDir, *, is_main: bool) -> None:
        """Start the trackers and send them the lines that they lack. Raises UserError where one cannot be started."""
        self._ledger = folder.tracked
        self._known: dict[str, Any] = json.loads(self._ledger.read_text()) if self._ledger.exists() else {}
        """The id of each tracker's run, and the newest line that it received."""
        self._at_work = {name: self._start(name, spec, folder) for name in spec.track.to if is_main}
        for line in read_jsonl(folder.metrics) if self._at_work else ():
            self.log(line)

    def log(self, line: dict[str, Any]) -> None:
        """Send one line of metrics. A tracker that fails gets no further lines; training goes on."""
        for name in list(self._at_work):
            if place_of(line) > tuple(self._known[name]["last"]):
                self._send(name, line)
        self._remember()

    def close(self) -> None:
        """Have trackers send what they still buffer."""
        for tracker in self._at_work.values():
            tracker.finish()
        self._at_work = {}

    def _start(self, name: str, spec: StageSpec, folder: StageDir) -> Any:
        known = self._known.setdefault(name, {"id": uuid.uuid4().hex, "last": [0, False]})
        if name == "tensorboard":
            known["last"] = [0, False]  # all lines are written again
        try:
            return _open(name, spec, folder, known)
        # Trackers raise errors of their own libraries. Before training this ends the run; a later failure does not.
        except Exception as error:
            remedy = "log in with its own tool, write track.offline = true, or remove it from track.to"
            raise UserError(f"{name} cannot be started: {error}", remedy) from error

    def _send(self, name: str, line: dict[str, Any]) -> None:
        try:
            self._at_work[name].log(named(line), step=line["step"])
        except Exception as error:  # noqa: BLE001 a tracker may raise whatever it likes, and the run goes on
            log.warning("%s is left out from step %d on: %s", name, line["step"], error)
            del self._at_work[name]
            return
        self._known[name]["last"] = place_of(line)

    def _remember(self) -> None:
        """Write down each tracker's newest line. Without fsync: a kill cannot tear a rename."""
        if not self._at_work:
            return
        try:
            with file_by_rename(self._ledger, durable=False) as file:
                file.write(json.dumps(self._known).encode())
        except OSError as error:
            log.warning("how far trackers came is not kept: %s", error)


def _open(name: str, spec: StageSpec, folder: StageDir, known: dict[str, Any]) -> Any:
    """Return accelerate's tracker, started; a resumed run continues under its id."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind: Any = LOGGER_TYPE_TO_CLASS[PACKAGES.get(name, name)]
    project, place = spec.track.project or spec.name, folder.path.parent / "track" / name
    if name == "tensorboard":
        for old in (place / folder.name).glob("events.out.tfevents.*"):
            old.unlink()
        tracker = kind(folder.name, str(place), purge_step=0)
    elif name == "mlflow":
        tracker = kind(project, None, run_id=known.get("run"), run_name=folder.name)
    else:
        tracker = kind(project, **_arguments(name, spec, folder.name, place, known["id"]))
    tracker.start()
    if name == "mlflow":
        known["run"] = tracker.active_run.info.run_id
    elif name != "tensorboard":
        tracker.store_init_configuration(msgspec.to_builtins(spec))
    return tracker


def _arguments(name: str, spec: StageSpec, stage: str, place: Path, known: str) -> dict[str, Any]:
    """Return each tracker's own arguments for the run's name, its id, resuming, and staying offline."""
    offline = spec.track.offline
    if offline and name in ("wandb", "swanlab"):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    match name:
        case "wandb":
            mode = {"mode": "offline", "dir": str(place)} if offline else {}
            return {"name": stage, "id": known, "resume": "allow", **mode}
        case "swanlab":
            mode = {"mode": "offline", "logdir": str(place)} if offline else {}
            return {"experiment_name": stage, "id": known[:21], "resume": "allow", **mode}
        case "comet":
            return {"experiment_key": known, "online": not offline}
        case _:
            return {"name": stage, "resume": "allow"}
