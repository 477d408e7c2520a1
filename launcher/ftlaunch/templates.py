"""Templates over a row's fields: "Question: {question}", "{answer[value]}", "{turns[0]}"."""

import re
from string import Formatter

from ftlaunch.errors import UserError

FIELD = re.compile(r"(?P<name>[^\[\]{}.]+)(?P<keys>(?:\[[^\[\]]+\])*)")
KEY = re.compile(r"\[([^\[\]]+)\]")
BRACES = "write {{ and }} for braces that are meant as they are"


def template_fields(template: str) -> list[tuple[str, ...]]:
    """The fields of a template in order, each a name and the keys looked up in it: `("answer", "value")`.

    A key of digits is an index where the value is a list. Raises UserError where the template is more than fields
    with keys, so that a template can fetch nothing but what stands in the row.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"is not a template: {error}".lower(), BRACES) from None
    return [_field(name, spec or "", conversion) for _, name, spec, conversion in parts if name is not None]


def _field(name: str, spec: str, conversion: str | None) -> tuple[str, ...]:
    if conversion or spec:
        written = f"{{{name}{f'!{conversion}' if conversion else ''}{f':{spec}' if spec else ''}}}"
        message = f"has {written}, and a field takes no conversion and no format"
        raise UserError(message, f"write {{field}}, or {BRACES}")
    if not name or name.isdecimal():
        raise UserError(f"has {{{name}}}, which names no field", "write the field's name, as in {question}")
    match = FIELD.fullmatch(name)
    if match is None:
        message = f"has {{{name}}}, which is neither {{field}} nor {{field[key]}}"
        raise UserError(message, "write {field} or {field[key]}")
    return (match["name"], *KEY.findall(match["keys"]))
