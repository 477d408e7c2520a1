"""Whether a chat template is blind to what turns say: it only copies their contents, whatever these are.

Then conversations whose turns have the same roles share every other character of their texts. This is proven on the
template's syntax tree. All values that a template works with are of one of four kinds; a template that does more with
a text than copy it, trim it or ask whether there is one is not blind. Whatever is not known here is not blind either.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache, reduce
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.parser import Parser
from jinja2.visitor import NodeVisitor


class Kind(Enum):
    """What a value of a template may be."""

    PLAIN = auto()
    """The same in all conversations whose turns have the same roles."""
    TEXT = auto()
    """A text that holds what turns say, unchanged."""
    TURN = auto()
    TURNS = auto()
    NAMES = auto()
    """A namespace or a loop, of which only attributes are used."""


@dataclass(frozen=True)
class Blindness:
    """That a template is blind, and to which contents."""

    trims: bool
    """It may trim contents: it is blind only to those that have no white space at their ends."""


class _Sees(Exception):
    """The template does something with a text, or with turns, that is not known to be the same for all texts."""


class _Generation(Extension):
    """`{% generation %}`, by which templates mark answers: what is inside stands as it is."""

    tags = {"generation"}  # noqa: RUF012 as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=64)
def blindness(template: str) -> Blindness | None:
    """None where the template is not proven to be blind."""
    try:
        tree = Environment(extensions=[_Generation, LoopControls]).parse(template)
        reading = _Reading()
        known: dict[str, Kind] | None = None
        while known != reading.names:  # names are read before and after they are given another kind
            known = dict(reading.names)
            reading.statements(tree.body)
    except (_Sees, TemplateSyntaxError, RecursionError):
        return None
    return Blindness(reading.trims)


ANSWERED_BY_ANY_TEXT = {"string", "defined", "undefined", "none", "mapping", "iterable", "sequence", "number"}
"""Tests that have the same answer for every text, and for every list or object."""
CALLABLE = {"raise_exception", "range", "dict"}
OF_LOOP = {"index", "index0", "revindex", "revindex0", "first", "last", "length", "depth", "depth0"}
UNKNOWN = {"self", "caller", "varargs", "kwargs", "lipsum", "cycler", "joiner", "strftime_now"}
"""Names that no template of ours needs, or whose values differ from call to call."""
TRIMMING = {"strip", "lstrip", "rstrip"}
SAID = "content"
"""The key of a turn under which it has its text."""


class _Reading(NodeVisitor):
    """Walks over a template's tree. Every method raises _Sees where the template is not blind.

    Methods for expressions return the Kind of their values, those for statements nothing.
    """

    def __init__(self) -> None:
        self.names: dict[str, Kind] = {"messages": Kind.TURNS, "loop": Kind.NAMES}
        """Kinds of variables, and of attributes of namespaces as "space.attribute"."""
        self.trims = False

    # statements

    def statements(self, body: Iterable[nodes.Node]) -> None:
        for node in body:
            self.visit(node)

    def generic_visit(self, node: nodes.Node, *_: Any, **__: Any) -> Any:  # noqa: ARG002 as the visitor has it
        """Refuse a node that no other method is for."""
        raise _Sees

    def visit_Output(self, node: nodes.Output) -> None:
        for expression in node.nodes:
            if not isinstance(expression, nodes.TemplateData):
                self.expect(expression, Kind.PLAIN, Kind.TEXT)

    def visit_If(self, node: nodes.If) -> None:
        self.kind(node.test)
        for body in (node.body, node.elif_, node.else_):
            self.statements(body)

    def visit_For(self, node: nodes.For) -> None:
        over = self.expect(node.iter, Kind.PLAIN, Kind.TURNS)
        if node.recursive:
            raise _Sees
        self.assign(node.target, Kind.TURN if over is Kind.TURNS else Kind.PLAIN)
        if node.test is not None:
            self.kind(node.test)
        self.statements(node.body)
        self.statements(node.else_)

    def visit_Assign(self, node: nodes.Assign) -> None:
        match node.node, node.target:
            case nodes.Call(node=nodes.Name(name="namespace")) as call, nodes.Name(name=name):
                self.open_namespace(name, call)
            case value, target:
                self.assign(target, self.kind(value))

    def open_namespace(self, name: str, call: nodes.Call) -> None:
        if call.args or call.dyn_args is not None or call.dyn_kwargs is not None:
            raise _Sees
        self.join(name, Kind.NAMES)
        for pair in call.kwargs:
            self.join(f"{name}.{pair.key}", self.kind(pair.value))

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> None:
        if node.filter is not None:
            raise _Sees
        self.statements(node.body)
        self.assign(node.target, Kind.TEXT)

    def visit_Break(self, node: nodes.Node) -> None:
        """Pass: the statement has no values in it."""

    visit_Continue = visit_Break

    def assign(self, target: nodes.Node, kind: Kind) -> None:
        if kind is Kind.NAMES:  # a second name for a namespace
            raise _Sees
        if isinstance(target, nodes.Tuple) and kind is Kind.PLAIN:
            for item in target.items:
                self.assign(item, kind)
        elif isinstance(target, nodes.Name):
            self.join(target.name, kind)
        elif isinstance(target, nodes.NSRef):
            self.join(f"{target.name}.{target.attr}", kind)
        else:
            raise _Sees

    def join(self, name: str, kind: Kind) -> None:
        """The name may stand for a value of that kind, too."""
        self.names[name] = _either(self.names.get(name, kind), kind)

    # expressions

    def kind(self, node: nodes.Node) -> Kind:
        return self.visit(node)

    def expect(self, node: nodes.Node, *kinds: Kind) -> Kind:
        kind = self.kind(node)
        if kind not in kinds:
            raise _Sees
        return kind

    def plain(self, *parts: nodes.Node | None) -> Kind:
        for part in parts:
            if part is not None:
                self.expect(part, Kind.PLAIN)
        return Kind.PLAIN

    def visit_Name(self, node: nodes.Name) -> Kind:
        if node.name in UNKNOWN:
            raise _Sees
        return self.names.get(node.name, Kind.PLAIN)

    def visit_Const(self, _: nodes.Node) -> Kind:
        return Kind.PLAIN

    visit_TemplateData = visit_Const

    def visit_List(self, node: nodes.Node) -> Kind:
        """Return the kind of an expression that works on plain values only."""
        return self.plain(*node.iter_child_nodes())

    visit_Tuple = visit_Dict = visit_Pair = visit_Slice = visit_List
    visit_Sub = visit_Mul = visit_Div = visit_FloorDiv = visit_Mod = visit_Pow = visit_Neg = visit_Pos = visit_List

    def visit_Concat(self, node: nodes.Concat | nodes.Add) -> Kind:
        items = node.nodes if isinstance(node, nodes.Concat) else (node.left, node.right)
        return reduce(_either, (self.expect(item, Kind.PLAIN, Kind.TEXT) for item in items))

    visit_Add = visit_Concat

    def visit_And(self, node: nodes.And | nodes.Or) -> Kind:
        return _either(self.kind(node.left), self.kind(node.right))

    visit_Or = visit_And

    def visit_CondExpr(self, node: nodes.CondExpr) -> Kind:
        self.kind(node.test)
        kind = self.kind(node.expr1)
        return kind if node.expr2 is None else _either(kind, self.kind(node.expr2))

    def visit_Not(self, node: nodes.Not) -> Kind:
        self.kind(node.node)
        return Kind.PLAIN

    def visit_Test(self, node: nodes.Test) -> Kind:
        if self.kind(node.node) is not Kind.PLAIN and node.name not in ANSWERED_BY_ANY_TEXT:
            raise _Sees
        return self.plain(*node.args)

    def visit_Compare(self, node: nodes.Compare) -> Kind:
        kinds = [self.kind(node.expr), *(self.kind(operand.expr) for operand in node.ops)]
        match kinds, node.ops[0].op, node.ops[0].expr:
            case _ if all(kind is Kind.PLAIN for kind in kinds):
                return Kind.PLAIN
            case [Kind.PLAIN, Kind.TURN], "in" | "notin", _:  # whether a turn has a key
                return Kind.PLAIN
            case [Kind.TEXT, Kind.PLAIN], "eq" | "ne", nodes.Const(value="" | None):
                return Kind.PLAIN
            case _:
                raise _Sees

    def visit_Getattr(self, node: nodes.Getattr) -> Kind:
        if self.kind(node.node) is not Kind.NAMES:
            return self.looked_up(node.node, node.attr)
        if not isinstance(node.node, nodes.Name):
            raise _Sees
        if node.node.name == "loop":
            if node.attr not in OF_LOOP:
                raise _Sees
            return Kind.PLAIN
        return self.names.get(f"{node.node.name}.{node.attr}", Kind.PLAIN)

    def visit_Getitem(self, node: nodes.Getitem) -> Kind:
        if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
            return self.looked_up(node.node, node.arg.value)
        of = self.expect(node.node, Kind.PLAIN, Kind.TURNS)
        self.plain(node.arg)
        if of is Kind.PLAIN:
            return of
        return Kind.TURNS if isinstance(node.arg, nodes.Slice) else Kind.TURN

    def looked_up(self, node: nodes.Expr, key: str) -> Kind:
        """What stands under a key or an attribute."""
        of = self.expect(node, Kind.PLAIN, Kind.TURN)
        if of is Kind.TURN and hasattr(dict, key):
            raise _Sees
        return Kind.TEXT if of is Kind.TURN and key == SAID else Kind.PLAIN

    def visit_Call(self, node: nodes.Call) -> Kind:
        arguments = [*node.args, *(pair.value for pair in node.kwargs)]
        if node.dyn_args is not None or node.dyn_kwargs is not None:
            raise _Sees
        if isinstance(node.node, nodes.Name) and node.node.name in CALLABLE - self.names.keys():
            return self.plain(*arguments)
        if not isinstance(node.node, nodes.Getattr):
            raise _Sees
        match self.kind(node.node.node):
            case Kind.TEXT if node.node.attr in TRIMMING and not arguments:
                self.trims = True
                return Kind.TEXT
            case Kind.TURN if node.node.attr == "get" and isinstance(key := _constant(arguments[:1]), str):
                self.plain(*arguments)
                return Kind.TEXT if key == SAID else Kind.PLAIN
            case Kind.PLAIN:
                return self.plain(*arguments)
            case _:
                raise _Sees

    def visit_Filter(self, node: nodes.Filter) -> Kind:
        if node.node is None or node.dyn_args is not None or node.dyn_kwargs is not None:
            raise _Sees
        arguments = [*node.args, *(pair.value for pair in node.kwargs)]
        match self.kind(node.node), node.name:
            case (Kind.TEXT, "trim") if not arguments:
                self.trims = True
                return Kind.TEXT
            case (Kind.TEXT, "string") if not arguments:
                return Kind.TEXT
            case (Kind.TURNS, "length" | "count"):
                return Kind.PLAIN
            case (Kind.TURNS, "list"):
                return Kind.TURNS
            case (Kind.TURNS, "first" | "last"):
                return Kind.TURN
            case (Kind.TURNS, "selectattr" | "rejectattr") if _constant(arguments[:1]) == "role":
                self.plain(*arguments)
                return Kind.TURNS
            case (Kind.PLAIN, filter_name) if filter_name != "random":
                return self.plain(*arguments)
            case _:
                raise _Sees


def _either(first: Kind, second: Kind) -> Kind:
    """A value that is of one kind or the other; a plain one may pass for a text."""
    if first is second:
        return first
    if {first, second} == {Kind.PLAIN, Kind.TEXT}:
        return Kind.TEXT
    raise _Sees


def _constant(arguments: Sequence[nodes.Expr]) -> object:
    """The value of the one argument, if it is written as such."""
    return arguments[0].value if arguments and isinstance(arguments[0], nodes.Const) else None
