"""What the launch log of a node tells of the ranks that have died there."""

from pathlib import Path

import msgspec
from tests.launcher.scripted_runs import write_run

from ftlaunch.processes.outcome import tell_death, tell_signal
from ftlaunch.recipe.stages import Parallel
from ftlaunch.run.files import write_json

NO_SUMMARY = "E1122 api.py:1003] failed (exitcode: -9) local_rank: 1 (pid: 402) of binary: python\n"


def test_a_rank_is_told_by_its_number_in_the_run_and_not_on_its_node(tmp_path: Path) -> None:
    stage_dir = write_run(tmp_path / "r", "train").stage_dir("01-sft")
    parallel = Parallel(nodes=2, procs_per_node=2, strategy="ddp")
    write_json(stage_dir.step, msgspec.structs.replace(stage_dir.read_spec(), parallel=parallel))
    attempt = stage_dir.new_attempt().on_node(1)
    attempt.launch_log.write_text(NO_SUMMARY)
    attempt.rank_log(3).write_text("the last word of rank 3\n")
    failure = tell_death(attempt, 1)
    assert (failure.rank, failure.type, failure.traceback) == (3, "SIGKILL", "the last word of rank 3")
    assert tell_signal(attempt, 1) == failure
