"""What is tried, and what a verdict is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Word = Literal["pass", "stops", "FAIL", "n/a", "not built yet"]
"""pass: it went on, exactly. stops: it loaded nothing wrong, but a person must help. FAIL: see the observation."""


@dataclass(frozen=True)
class Verdict:
    """What came of a trial, and what was seen."""

    word: Word
    observation: str

    def __str__(self) -> str:
        return f"**{self.word}** {self.observation}".strip()


NOT_APPLICABLE = Verdict("n/a", "")


class Saver(Protocol):
    """A way to train and to save while at it."""

    pickles: tuple[str, ...]
    """Files that its checkpoints load by unpickling, or that others' do."""

    def train(self, folder: Path, *, stop_at: int | None = None) -> str:
        """Train 8 steps, saving every 2, from the checkpoint that the stack itself chooses; a digest of the weights.

        `stop_at` leaves after the save of that step. Returns "" then.
        """
        ...

    def checkpoints(self, folder: Path) -> list[Path]:
        """Finished or not, the newest last."""
        ...

    def weights(self, checkpoint: Path) -> Path: ...

    def optimizer(self, checkpoint: Path) -> Path: ...


Try = Callable[[Path], Verdict]
"""One trial of one stack, in an empty folder."""


@dataclass(frozen=True)
class Trial:
    """A row of the table."""

    key: str
    question: str


TRIALS = (
    Trial("kill", "SIGKILL in the middle of a save, at each file of it: does the run go on, exactly?"),
    Trial("flip weights", "One bit of the saved weights flipped: noticed?"),
    Trial("flip optimizer", "One bit of the saved optimizer state flipped: noticed?"),
    Trial("truncate", "The weights file cut in half: noticed?"),
    Trial("missing", "The optimizer's file deleted: noticed?"),
    Trial("empty", "An empty folder with the newest checkpoint's name: chosen?"),
    Trial("latest", "One of two ranks killed while it saves: does the newest checkpoint's mark name a whole one?"),
    Trial("hang", "One of two ranks stopped (SIGSTOP): noticed within 60 s?"),
    Trial("newline", "A line break in a value: does it become a command of the SLURM script?"),
    Trial("pickle", "A pickle with a payload among the files that resume reads: run?"),
    Trial("secret", "A token given as the stack wants it: is it in a file that the run leaves, or in a command line?"),
)
