"""What the vocabulary is made of: tables, kinds of tables, and what their numbers and texts are kept within."""

import re
from collections.abc import Callable
from typing import Annotated, Any, get_args

from msgspec import Meta, Struct

Positive = Annotated[int, Meta(ge=1)]
NonNegative = Annotated[int, Meta(ge=0)]
Above0 = Annotated[float, Meta(gt=0)]
AtLeast0 = Annotated[float, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]
# An empty text would be a path, a field or a template that names nothing.
Text = Annotated[str, Meta(min_length=1)]
# Texts that name something: load/paths.py settles a key by what its type says here.
ModelName = Annotated[str, Meta(min_length=1, extra={"names": "model"})]
DataName = Annotated[str, Meta(min_length=1, extra={"names": "data"})]
SplitOrFile = Annotated[str, Meta(min_length=1, extra={"names": "evaluation"})]
TemplateName = Annotated[str, Meta(min_length=1, extra={"names": "template"})]
FunctionName = Annotated[str, Meta(min_length=1, extra={"names": "function"})]
MetricName = Annotated[str, Meta(min_length=1, extra={"names": "metric"})]
# load.messages quotes this where a name is wrong: the pattern itself would help no user.
WORD = "one word of letters, digits, '.', '_' and '-' that begins with a letter or digit"
# Names become folders (runs/NAME), where one that begins with a dot is hidden and one with a dash reads as an option.
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64, description=WORD)]


class Table(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of a recipe: a key that it does not know is an error."""


def _snake_case(name: str) -> str:
    # LockedDropout → locked_dropout, PTuning → p_tuning.
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


class Kind(Table, frozen=True, kw_only=True, tag_field="kind", tag=_snake_case):
    """A table of one kind among several, which its key `kind` tells: the class's name in snake case.

    What is true of all tables of a kind stands on its class.
    """


def kinds(union: Any, which: Callable[[Any], bool] = lambda _: True) -> tuple[str, ...]:
    """What `kind` may be in a table of this union, in its order; only of members for which `which` holds."""
    return tuple(member.__struct_config__.tag for member in get_args(union) if which(member))
