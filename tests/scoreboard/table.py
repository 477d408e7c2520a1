"""Who is tried at what, and the table that comes of it."""

import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

from tests.scoreboard import ours, saves, stock, two_ranks
from tests.scoreboard.accelerator import AcceleratorSaver
from tests.scoreboard.deepspeeds import DeepSpeedSaver
from tests.scoreboard.trainer import TrainerSaver
from tests.scoreboard.trial import NOT_APPLICABLE, TRIALS, Try, Verdict

TABLE = Path(__file__).with_name("README.md")
STACKS = ("ftlaunch", "transformers Trainer (TRL)", "accelerate save_state", "DeepSpeed", "submitit")
PACKAGES = ("torch", "transformers", "trl", "accelerate", "deepspeed", "submitit")

HEAD = """\
# Scoreboard

Faults and attacks, tried on ftlaunch and on the stock stack. Each cell is what one real experiment did, on tiny models:
processes are killed or stopped, files damaged, payloads planted. Made, and to be made again, by

    make scoreboard

**pass**: it went on, and ended with the very weights of an unbroken run (or: nothing leaked, nothing was run).
**stops**: it loaded nothing wrong, but somebody must help. **FAIL**: what is written next to it. **n/a**: no such part.
TRL's trainers save and resume by transformers' Trainer, which is what is tried.
"""


def experiments(place: Path) -> dict[str, dict[str, Try]]:
    """For each stack its trials; `place` is for what ftlaunch trains on."""
    mine, trainer, accelerator, deepspeed = ours.OurSaver(place), TrainerSaver(), AcceleratorSaver(), DeepSpeedSaver()
    of_ranks: dict[str, Callable[..., Verdict]] = {"latest": two_ranks.latest, "hang": two_ranks.hang}

    def in_pairs(saver: two_ranks.GroupSaver) -> dict[str, Try]:
        return {key: lambda work, act=act: act(saver, work) for key, act in of_ranks.items()}

    by_command = {"latest": ours.latest, "hang": ours.hang, "newline": ours.newline, "secret": ours.secret}
    return {
        STACKS[0]: saves.trials(mine) | {key: lambda work, act=act: act(mine, work) for key, act in by_command.items()},
        STACKS[1]: saves.trials(trainer) | in_pairs(trainer) | {"secret": stock.trainer_secret},
        STACKS[2]: saves.trials(accelerator) | in_pairs(accelerator),
        STACKS[3]: saves.trials(deepspeed) | in_pairs(deepspeed) | {"secret": stock.deepspeed_secret},
        STACKS[4]: {
            "newline": stock.submitit_newline,
            "pickle": stock.submitit_pickle,
            "secret": stock.submitit_secret,
        },
    }


def render(verdicts: Mapping[tuple[str, str], Verdict]) -> str:
    """The table as Markdown, with what it was made with; `verdicts` by trial and stack."""
    lines = [HEAD, f"| | {' | '.join(STACKS)} |", "| --- " * (len(STACKS) + 1) + "|"]
    for trial in TRIALS:
        cells = [str(verdicts.get((trial.key, stack), NOT_APPLICABLE)).replace("|", "\\|") for stack in STACKS]
        lines.append(f"| {trial.question} | {' | '.join(cells)} |")
    made_with = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return "\n".join([*lines, "", f"Made with {made_with}, Python {platform.python_version()}, on CPUs.", ""])
