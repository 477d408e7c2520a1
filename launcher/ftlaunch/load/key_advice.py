"""Which tables a recipe may have and which keys stand in which: it explains a key that is out of place."""

from collections.abc import Iterator, Sequence

import msgspec.inspect as types
from msgspec import Struct

from ftlaunch.load.messages import as_toml, closest, join_or


class Table(Struct, frozen=True):
    """A place in a recipe where keys may stand."""

    label: str
    """`[model]`, `[[stage]]`, `[data.NAME]` or `the top of the file`."""
    kinds: tuple[types.StructType, ...]
    """What it can hold: one struct, or one for each `kind`."""

    def home_of(self, key: str) -> str | None:
        """The table, with the kinds that know the key; None where none does."""
        tags = [as_toml(kind.tag) for kind in self.kinds if key in names(kind)]
        # Where all kinds know the key, none needs to be named.
        if len(tags) in (0, len(self.kinds)):
            return self.label if tags else None
        return f"{self.label} of kind {join_or(tags)}"


class Advice(Struct, frozen=True):
    """What to say about a key that its table does not know."""

    message: str
    remedy: str
    meant: str | None = None
    """The key of the same table that was probably meant."""


def advise(tables: Sequence[Table], key: str, kind: types.StructType, kinds: Sequence[types.StructType]) -> Advice:
    """Explain an unknown key of a table that is of `kind` out of `kinds`; `tables` are those of the whole recipe."""
    # A key of another kind or table is certain, a misspelling is a guess: so that comes last.
    tags = [as_toml(other.tag) for other in kinds if key in names(other)]
    if tags:
        message = f"belongs to kind {join_or(tags)}, and this table's kind is {as_toml(kind.tag)}"
        return Advice(message, f"remove it, or write {kind.tag_field} = {tags[0]}")
    homes = [home for table in tables if (home := table.home_of(key))]
    if homes:
        return Advice(f"is not known here: it belongs to {join_or(homes)}", f"move it to {join_or(homes)}")
    return _guess(tables, key, kind)


def _guess(tables: Sequence[Table], key: str, kind: types.StructType) -> Advice:
    message = "is not a known key"
    known = names(kind)
    if meant := closest(key, known):
        return Advice(message, f"did you mean {as_toml(meant)}?", meant)
    for table in tables:
        # lora = true, or a header [lora]: the name of a kind in place of a key.
        if key in (tags := {struct.tag: struct.tag_field for struct in table.kinds}):
            return Advice(message, f"write {table.label} with {tags[key]} = {as_toml(key)}")
    for table in tables:
        # Stricter than in the key's own table, as among all words one is easily alike.
        if meant := closest(key, [name for struct in table.kinds for name in names(struct)], likeness=0.75):
            return Advice(message, f"did you mean {as_toml(meant)}, which belongs to {table.home_of(meant)}?")
    return Advice(message, f"remove it; this table knows {', '.join(known)}" if known else "remove it")


def names(kind: types.StructType) -> list[str]:
    """The keys that a table of this kind knows, its `kind` first."""
    tag = [kind.tag_field] if kind.tag_field else []
    return [*tag, *(field.encode_name for field in kind.fields)]


def structs(kind: types.Type) -> tuple[types.StructType, ...]:
    """The structs that a table of this type can hold; for a list or dict of tables, those of its elements."""
    match kind:
        case types.StructType():
            return (kind,)
        case types.Metadata():
            return structs(kind.type)
        case types.UnionType():
            return tuple(struct for member in kind.types for struct in structs(member))
        case types.ListType():
            return structs(kind.item_type)
        case types.DictType():
            return structs(kind.value_type)
        case _:
            return ()


def tables_of(top: types.StructType) -> Iterator[Table]:
    """Every table of a recipe, nearest to the top first."""
    yield Table("the top of the file", (top,))
    seen = {top.cls}
    waiting = [("", top)]
    while waiting:
        prefix, struct = waiting.pop(0)
        for field in struct.fields:
            name = f"{prefix}{field.encode_name}"
            # [model] and a stage's model are one struct; the place nearest to the top is the one to name.
            kinds = tuple(kind for kind in structs(field.type) if kind.cls not in seen)
            if kinds:
                seen.update(kind.cls for kind in kinds)
                waiting.extend((f"{name}.", kind) for kind in kinds)
                yield Table(_label(name, field.type), kinds)


def _label(name: str, kind: types.Type) -> str:
    if isinstance(kind, types.ListType):
        return f"[[{name}]]"
    return f"[{name}.NAME]" if isinstance(kind, types.DictType) else f"[{name}]"
