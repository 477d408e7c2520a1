"""What a run has made, and what its user may want to do with it."""

import shlex
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from ftlaunch.run.layout import REWARD_HEAD, RunDir, StageDir

FOLDED_INTO = {"base": "the base's own weights", "dequantized": "the dequantized weights"}


class Merged(Struct, frozen=True, kw_only=True):
    """What result.json tells of a merge: the merged model against the adapter model, over probe text."""

    method: str
    kl: float
    """Nats a token."""
    max_logit_difference: float
    top1_agreement: float
    """Share of positions, or of pairs of probes."""
    of: Literal["tokens", "rewards"] = "tokens"
    """What the models say: a reward model's KL is of the preference between two probes."""

    def __str__(self) -> str:
        unit, value, same = {
            "tokens": ("token", "logit", "first choice at {} of positions"),
            "rewards": ("pair", "reward", "preference in {} of pairs"),
        }[self.of]
        return (
            f"folded into {FOLDED_INTO.get(self.method, self.method)}; "
            f"against the adapter model: KL {self.kl:.2g} nats a {unit}, "
            f"max |Δ{value}| {self.max_logit_difference:.2g}, same {same.format(f'{self.top1_agreement:.1%}')}"
        )


def newest_output(run: RunDir, *, merged: bool) -> Path | None:
    """The folder of the newest artifact or, if `merged` counts too, merged model; None where there is none yet."""
    finished = [stage_dir for stage_dir in run.stage_dirs() if stage_dir.result.exists()]
    made = [path for step in finished for path in (step.artifact, *([step.model] if merged else [])) if path.is_dir()]
    return made[-1] if made else None


def describe(run: RunDir) -> str:
    """Where a run's model or adapter is, how good a merge it is, and the line to try it with; empty without one."""
    path = newest_output(run, merged=True)
    if path is None:
        return ""
    stage_dir = StageDir(path.parent)
    is_reward = (path / REWARD_HEAD).exists()
    kind = "adapter" if (path / "adapter_config.json").exists() else "model"
    merged = [f"  {told}"] if path == stage_dir.model and (told := _read_merged(stage_dir)) else []
    try_it = [] if is_reward else [f'  try it: ftlaunch chat {shlex.quote(str(path))} --prompt "…"']
    what = f"{'merged ' if path == stage_dir.model else ''}{'reward ' if is_reward else ''}{kind}"
    return "\n".join([f"{what}: {path}", *merged, *try_it])


def _read_merged(stage_dir: StageDir) -> str | None:
    """The comparison in a merge's result, in words."""
    return describe_merge(msgspec.json.decode(stage_dir.result.read_bytes()))


def describe_merge(result: object) -> str | None:
    """What a merge's result.json says in words; None where another version of ftlaunch has written it."""
    try:
        return str(msgspec.convert(result, type=Merged))
    except msgspec.ValidationError:
        return None
