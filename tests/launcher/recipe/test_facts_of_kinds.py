"""What is true of a kind stands on its struct, for every kind of every union."""

from typing import Any, ClassVar, get_args, get_origin, get_type_hints

import pytest

from ftlaunch.recipe.adapter import Adapter, LowRank
from ftlaunch.recipe.noise import Noise
from ftlaunch.recipe.stages import Stage, Training
from ftlaunch.recipe.types import Kind, kinds

KINDS: list[Any] = [*get_args(Adapter), *get_args(Noise), *get_args(Stage)]


def facts(kind: Any) -> list[str]:
    """Names of what is declared of a kind or of what it inherits from."""
    return [name for name, hint in get_type_hints(kind).items() if get_origin(hint) is ClassVar and name[0] != "_"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__struct_config__.tag)
def test_a_kind_says_all_that_is_asked_of_it(kind: Any) -> None:
    assert issubclass(kind, Kind)
    assert kind.__struct_config__.forbid_unknown_fields
    assert all(hasattr(kind, fact) for fact in facts(kind)), f"{kind.__name__} must say {facts(kind)}"


def test_facts_are_declared_and_no_keys_of_a_recipe() -> None:
    assert {"label", "rate", "begins_as_base", "takes_loss_scaling"} <= {*facts(get_args(Adapter)[0])}
    assert facts(get_args(Noise)[0]) == ["family"]
    assert {*facts(get_args(Stage)[0])} == {"lora_rate", "has_head", "evaluated"}
    assert not any({*facts(kind)} & {*kind.__struct_fields__} for kind in KINDS)


def test_labels_and_kinds_are_told_apart() -> None:
    for union in (Adapter, LowRank, Noise, Stage):
        assert len({*kinds(union)}) == len(get_args(union))
    assert len({kind.label for kind in get_args(Adapter)}) == len(get_args(Adapter))


def test_kinds_can_be_chosen_by_what_is_true_of_them() -> None:
    assert kinds(Stage, lambda kind: not issubclass(kind, Training)) == ("merge", "evaluate")


def test_a_kind_of_ones_own_lacks_what_it_does_not_say() -> None:
    class Toy(LowRank, frozen=True, kw_only=True):
        """A kind without a label."""

    assert Toy.__struct_config__.tag == "toy"
    assert not hasattr(Toy, "label")
