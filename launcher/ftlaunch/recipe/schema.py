"""The JSON Schema of a recipe, with which an editor completes and explains its keys."""

import ast
import inspect
from collections.abc import Sequence
from typing import Any, cast

import msgspec

from ftlaunch.recipe import adapter, data, model, noise, recipe, stages, track
from ftlaunch.recipe.types import Name

DIALECT = "http://json-schema.org/draft-07/schema#"
"""What taplo and VS Code both know. msgspec speaks 2020-12, so a few words are put differently below."""

Node = dict[str, Any]
NAME: Node = {key: value for key, value in msgspec.json.schema(Name).items() if key in ("maxLength", "pattern")}
"""What a user may call a table. msgspec leaves it out of a dict's keys where their type has a description."""


def json_schema() -> Node:
    """A schema (draft 7) of recipe.toml, described with the strings below the fields of its classes."""
    generated = msgspec.json.schema(recipe.Recipe)
    documents = _documentation()
    definitions = {name: _describe(_plain(node), documents[name]) for name, node in generated["$defs"].items()}
    top = definitions.pop("Recipe")
    whole = {"required": top.pop("required")}
    # What a recipe leaves out may stand in its base.
    either = {"anyOf": [whole, {"required": ["extends"]}]}
    return {"$schema": DIALECT, **top, **either, "title": "ftlaunch recipe", "definitions": definitions}


def _documentation() -> dict[str, dict[str, str]]:
    """Return the string below each field of each class of the vocabulary, inherited ones included."""
    documents: dict[str, dict[str, str]] = {}
    nodes = [
        node
        for module in (adapter, noise, model, data, stages, track, recipe)
        for node in ast.parse(inspect.getsource(module)).body
    ]
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            # Parents stand above their children in a module, so their strings are collected by now.
            parents = [parent.id for parent in node.bases if isinstance(parent, ast.Name)]
            inherited = {key: text for parent in parents for key, text in documents.get(parent, {}).items()}
            documents[node.name] = inherited | _field_strings(node)
    return documents


def _field_strings(node: ast.ClassDef) -> dict[str, str]:
    strings: dict[str, str] = {}
    for field, below in zip(node.body, node.body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                strings[name] = inspect.cleandoc(text)
            case _:
                pass
    return strings


def _plain(node: Any) -> Any:
    """The node in the words of draft 7, without null, which TOML does not have."""
    match node:
        case list() | tuple():
            return [_plain(element) for element in cast("Sequence[Any]", node)]
        case dict():
            return _plain_object(cast("Node", node))
        case str():
            return node.replace("#/$defs/", "#/definitions/")
        case _:
            return node


def _plain_object(node: Node) -> Node:
    # "discriminator" is a word of OpenAPI, which JSON Schema does not know.
    plain: Node = {key: _plain(value) for key, value in node.items() if key != "discriminator"}
    if "prefixItems" in plain:
        # A tuple such as `betas`: 2020-12 lists its places under "prefixItems", draft 7 under "items".
        plain |= {"items": plain.pop("prefixItems"), "additionalItems": False}
    if isinstance(plain.get("additionalProperties"), dict):
        plain.setdefault("propertyNames", NAME)
    # The ellipsis stands for "no default", since the default null means something else: TOML cannot write it.
    if plain.get("default", ...) is None:
        del plain["default"]
    return _without_null(plain)


def _without_null(node: Node) -> Node:
    if "anyOf" not in node:
        return node
    options = [option for option in node["anyOf"] if option != {"type": "null"}]
    rest = {key: value for key, value in node.items() if key != "anyOf"}
    # Without null a single option may be left, which needs no anyOf around it.
    return {**rest, **options[0]} if len(options) == 1 else {**rest, "anyOf": options}


def _describe(node: Node, strings: dict[str, str]) -> Node:
    """The definition of a table with each property described."""
    properties: Node = {}
    strings = {"kind": node["description"], **strings}
    for name, schema in node.get("properties", {}).items():
        # Draft 7 ignores all other keys of an object that has a $ref.
        wrapped = {"allOf": [schema]} if "$ref" in schema else schema
        described = {"description": strings.get(name, "")}
        # Merged twice: the left one puts the description first, the right one keeps a type's own from replacing it.
        properties[name] = described | wrapped | described
    return {**node, "properties": properties}
