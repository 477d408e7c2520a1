"""`python -m tests.scoreboard`: try everything and write the table. Some minutes on two cores."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

# Before torch is imported: no GPU, and nothing that a fork cannot take along.
os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

from tests.scoreboard.child import outcome
from tests.scoreboard.ours import OurSaver
from tests.scoreboard.table import STACKS, TABLE, experiments, render
from tests.scoreboard.trial import TRIALS, Verdict


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.scoreboard")
    parser.add_argument("--trial", choices=[trial.key for trial in TRIALS], help="only this one; no table is written")
    parser.add_argument("--stack", choices=STACKS, help="only this one; no table is written")
    options = parser.parse_args()
    _import_all()
    verdicts: dict[tuple[str, str], Verdict] = {}
    with tempfile.TemporaryDirectory(prefix="scoreboard-") as place:
        outcome(OurSaver(Path(place)).make, Path(place))
        for stack, tries in experiments(Path(place)).items():
            for trial in TRIALS:
                if trial.key in tries and options.trial in (None, trial.key) and options.stack in (None, stack):
                    work = Path(tempfile.mkdtemp(dir=place))
                    verdicts[trial.key, stack] = verdict = tries[trial.key](work)
                    print(f"{stack:28} {trial.key:16} {verdict}", flush=True)
    if options.trial is None and options.stack is None:
        TABLE.write_text(render(verdicts))
        print(TABLE)
    return 0


def _import_all() -> None:
    """Once, for all the processes that are forked from this one."""
    import accelerate  # noqa: F401
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    from transformers import LlamaForCausalLM, Trainer  # noqa: F401

    import fttrain.stages.sft  # noqa: F401


if __name__ == "__main__":
    sys.exit(main())
