"""What goes wrong because of what a user wrote or asked, and the exit codes that say so."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

# 1 is left to Python, which exits with it after a traceback. 130 is 128 + SIGINT, as shells report it.
DONE: Final = 0
BAD_INPUT: Final = 2
STAGE_FAILED: Final = 3
STOPPED: Final = 4
INTERRUPTED: Final = 130


class UserError(Exception):
    """A mistake that the user can mend: what is wrong, and what to do about it."""

    exit_code: int = BAD_INPUT

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  → {self.remedy}"


class Interrupted(UserError):
    """What was being done was undone, because a signal asked for it."""

    def __init__(self, message: str, remedy: str, exit_code: int) -> None:
        super().__init__(message, remedy)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a recipe or with the data it names."""

    where: str
    """`file:line`, or the command-line option that set the key."""
    key: str
    """Dotted path of the key, such as `stage[0].learning_rate`; empty where no key is to blame."""
    message: str
    remedy: str

    def __str__(self) -> str:
        subject = f"{self.where}: {self.key}" if self.key else self.where
        return f"{subject}: {self.message}\n  → {self.remedy}"


class RecipeError(UserError):
    """Every problem of a recipe, found in one pass."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        # `__str__` shows each problem with its remedy; these two are for callers that read only `message` and `remedy`.
        super().__init__("\n".join(problem.message for problem in problems), problems[0].remedy)

    def __str__(self) -> str:
        # A single problem needs no count.
        head = [f"{len(self.problems)} problems"] if len(self.problems) > 1 else []
        return "\n".join([*head, *map(str, self.problems)])
