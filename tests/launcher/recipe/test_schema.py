"""The published JSON Schema: every key described, every reference resolved, and of one mind with the decoder."""

import json
from collections.abc import Iterator
from typing import Any, get_args

import pytest

from ftlaunch.recipe.adapter import Adapter
from ftlaunch.recipe.schema import json_schema

SCHEMA = json_schema()
TABLES = {"Recipe": SCHEMA, **SCHEMA["definitions"]}


def nodes(node: Any) -> Iterator[dict[str, Any]]:
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    if isinstance(node, dict):
        yield node
    for child in children:
        yield from nodes(child)


def test_it_is_json_of_a_dialect_that_editors_know() -> None:
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA
    assert SCHEMA["$schema"] == "http://json-schema.org/draft-07/schema#"


def test_every_reference_leads_to_a_definition_and_stands_alone() -> None:
    references = [node for node in nodes(SCHEMA) if "$ref" in node]
    assert {node["$ref"].removeprefix("#/definitions/") for node in references} == set(SCHEMA["definitions"])
    assert all(len(node) == 1 for node in references)


def test_nothing_of_other_dialects_is_left() -> None:
    words = {key for node in nodes(SCHEMA) for key in node}
    assert not words & {"discriminator", "prefixItems", "$defs"}
    assert {"type": "null"} not in list(nodes(SCHEMA))
    assert all(node["default"] is not None for node in nodes(SCHEMA) if "default" in node)


@pytest.mark.parametrize("name", TABLES)
def test_every_table_and_key_is_described(name: str) -> None:
    table = TABLES[name]
    assert table["description"].endswith(".")
    assert table["additionalProperties"] is False
    assert [key for key, schema in table["properties"].items() if not schema["description"]] == []


def test_a_key_s_description_is_the_string_below_it() -> None:
    description = TABLES["Sft"]["properties"]["max_grad_norm"]["description"]
    assert description == "Gradients are scaled down to this global norm. 0 turns clipping off."
    assert TABLES["Model"]["properties"]["quantization"]["description"].startswith('"nf4" holds the frozen weights')


def test_a_table_is_told_apart_by_its_kind() -> None:
    assert TABLES["Lora"]["properties"]["kind"]["enum"] == ["lora"]
    assert "kind" in TABLES["Lora"]["required"]
    kinds = [option["$ref"].rpartition("/")[2] for option in SCHEMA["properties"]["adapter"]["anyOf"]]
    assert kinds == [kind.__name__ for kind in get_args(Adapter)]


def test_bounds_and_choices_are_there() -> None:
    properties = TABLES["Sft"]["properties"]
    assert properties["learning_rate"]["exclusiveMinimum"] == 0
    assert set(properties["schedule"]["enum"]) == {"constant", "linear", "cosine"}
    assert properties["batch_size"]["default"] == 8
    assert len(TABLES["Optimizer"]["properties"]["betas"]["items"]) == 2


def test_a_recipe_that_extends_may_leave_the_rest_to_its_base() -> None:
    assert SCHEMA["anyOf"] == [{"required": ["name", "model", "stage"]}, {"required": ["extends"]}]
    assert "required" not in SCHEMA
