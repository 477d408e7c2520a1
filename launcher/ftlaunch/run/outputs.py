"""What a run has made, and what its user may want to do with it."""

import shlex
from pathlib import Path

from ftlaunch.run.layout import REWARD_HEAD, RunDir, StageDir
from ftlaunch.run.records import MergeResult, read_result

FOLDED_INTO = {"base": "the base's own weights", "dequantized": "the dequantized weights"}


def newest_output(run: RunDir, *, merged: bool) -> Path | None:
    """The folder of the newest artifact or, if `merged` counts too, merged model; None where there is none yet."""
    finished = [stage_dir for stage_dir in run.stage_dirs() if stage_dir.result.exists()]
    # An evaluate stage has a result and neither folder.
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
    # None where another version of ftlaunch has written it.
    result = read_result(stage_dir.result, "merge") if path == stage_dir.model else None
    merged = [f"  {describe_merge(result)}"] if isinstance(result, MergeResult) else []
    try_it = [] if is_reward else [f'  try it: ftlaunch chat {shlex.quote(str(path))} --prompt "…"']
    what = f"{'merged ' if path == stage_dir.model else ''}{'reward ' if is_reward else ''}{kind}"
    return "\n".join([f"{what}: {path}", *merged, *try_it])


def describe_merge(result: MergeResult) -> str:
    """How a merge was made, and how like the adapter model it is."""
    value, unit, same = result.words
    return (
        f"folded into {FOLDED_INTO.get(result.method, result.method)}; "
        f"against the adapter model: KL {result.kl:.2g} nats per {unit}, "
        f"max |Δ{value}| {result.max_logit_difference:.2g}, same {same.format(f'{result.top1_agreement:.1%}')}"
    )
