"""Sites, replaced activation functions and adversaries on tiny models of several families."""

from collections.abc import Callable

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
)

from ftlaunch.errors import UserError
from ftlaunch.recipe.noise import Adversarial, Gaussian, NoNoise, Saturated
from fttrain.noise import modules, replace_activations
from fttrain.noise.activation_functions import Golu, NoisyWhereSaturated
from fttrain.noise.adversarial import AdversarialNoise
from fttrain.noise.row_index import Places

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
FAMILIES = {
    "llama": (LlamaConfig(**SMALL), "act_fn", "hidden_act"),
    "gpt2": (GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2), "act", "activation_function"),
    "gemma": (GemmaConfig(**SMALL, head_dim=8), "act_fn", "hidden_act"),
    "qwen": (Qwen2Config(**SMALL), "act_fn", "hidden_act"),
    "mistral": (MistralConfig(**SMALL), "act_fn", "hidden_act"),
    "phi": (PhiConfig(**SMALL), "activation_fn", "hidden_act"),
}
IDS = torch.arange(12)[None]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mlp_s_activation_is_found_and_replaced(family: str):
    config, attribute, key = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    found = modules.find(model, "mlp-activation")
    assert len(found) == 2
    assert found == modules.find(model, [attribute])
    assert found == modules.find(model, rf".*\.{attribute}")
    before = model(IDS).logits
    replace_activations.install(model, [NoNoise(activation="golu")])
    assert all(isinstance(model.get_submodule(name), Golu) for name in found)
    assert modules.find(model, "mlp-activation") == found
    assert not torch.equal(model(IDS).logits, before)
    replace_activations.install(model, [NoNoise(activation="relu")])
    assert getattr(model.config, key) == "relu"
    as_named = AutoModelForCausalLM.from_config(model.config).eval()
    as_named.load_state_dict(model.state_dict())
    assert torch.equal(as_named(IDS).logits, model(IDS).logits)


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))


def test_what_matches_nothing_is_refused_with_what_there_is(model: torch.nn.Module):
    for words in ("actfn", ["act_fn", "actfn"]):
        with pytest.raises(UserError, match="actfn") as caught:
            modules.find(model, words)
        assert caught.value.remedy.startswith("activation functions are called: act_fn; other modules: ")
        assert "mlp" in caught.value.remedy


def test_saturated_noise_is_one_site_and_no_config_can_hold_it(model: torch.nn.Module):
    table = Saturated()
    replace_activations.install(model, [table])
    found = modules.find(model, "mlp-activation")
    assert [type(model.get_submodule(name)) for name in found] == [NoisyWhereSaturated] * 2
    with pytest.raises(UserError, match="Gulcehre"):
        replace_activations.write_into({"hidden_act": "silu"}, [table])


@pytest.mark.parametrize(
    ("table", "reason"),
    [(NoNoise(activation="golu"), "golu"), (NoNoise(activation="relu", sites=["layers.0.mlp.act_fn"]), "sites")],
)
def test_what_no_config_says_is_not_merged(table: NoNoise, reason: str):
    with pytest.raises(UserError, match=reason):
        replace_activations.write_into({"hidden_act": "silu"}, [table])


def test_a_config_says_what_the_last_table_left():
    config = {"hidden_act": "silu", "model_type": "llama"}
    replace_activations.write_into(config, [NoNoise(activation="relu"), Gaussian(), NoNoise(activation="gelu_tanh")])
    assert config == {"hidden_act": "gelu_pytorch_tanh", "model_type": "llama"}


Ask = Callable[[], torch.Tensor]


@pytest.fixture
def adversary(model: torch.nn.Module) -> Callable[..., tuple[AdversarialNoise, Ask, list[torch.Tensor]]]:
    """An adversary on the activations of both layers, the loss that it disturbs, and the second site's outputs."""

    def make(**fields: object) -> tuple[AdversarialNoise, Ask, list[torch.Tensor]]:
        model.train()
        places = Places()
        places.take(torch.tensor([[5] * 5 + [7] * 7]), torch.tensor([[*range(5), *range(7)]]))
        found = [model.get_submodule(name) for name in modules.find(model, "mlp-activation")]
        made = AdversarialNoise(Adversarial(**fields), found, places)  # type: ignore[arg-type]
        seen: list[torch.Tensor] = []
        found[1].register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))
        return made, lambda: model(IDS, labels=IDS).loss, seen

    return make


@pytest.mark.parametrize("fields", [{"norm": "l2"}, {"norm": "linf"}, {"per": "row"}, {"steps": 3}, {"relative": True}])
def test_an_adversary_finds_a_larger_loss(adversary: Callable, fields: dict[str, object]):
    made, ask, seen = adversary(epsilon=0.02, weight=1.0, **fields)
    clean = float(ask().detach())
    seen.clear()
    both = made.loss(ask)
    assert float(both.detach()) - clean > clean + 1e-5
    assert len(seen) == 1 + fields.get("steps", 1)
    torch.testing.assert_close(float(ask().detach()), clean)  # nothing of it stays


def test_delta_has_its_size_and_direction():
    places = Places()
    places.take(torch.tensor([[5] * 5 + [7] * 7]), torch.tensor([[*range(5), *range(7)]]))
    torch.manual_seed(1)
    gradient, activation = torch.randn(1, 12, 6), torch.randn(1, 12, 6)
    rows = [slice(0, 5), slice(5, 12)]

    def delta(before: torch.Tensor | None = None, **fields: object) -> torch.Tensor:
        made = AdversarialNoise(Adversarial(epsilon=0.3, **fields), [], places)  # type: ignore[arg-type]
        return made._moved(before, gradient, activation)

    per_token = delta()
    torch.testing.assert_close(per_token.norm(dim=-1), torch.full((1, 12), 0.3))
    torch.testing.assert_close(per_token, 0.3 * gradient / gradient.norm(dim=-1, keepdim=True))
    by_row = delta(per="row")
    assert [float(by_row[0, row].norm()) for row in rows] == [pytest.approx(0.3)] * 2
    torch.testing.assert_close(delta(norm="linf"), 0.3 * gradient.sign())
    sized = delta(relative=True).norm(dim=-1) / activation.norm(dim=-1)
    torch.testing.assert_close(sized, torch.full((1, 12), 0.3))
    projected = delta(before=per_token * 0.9, steps=2)
    torch.testing.assert_close(projected.norm(dim=-1), torch.full((1, 12), 0.3))
    assert not delta(before=None, steps=5, step_size=0.1).norm(dim=-1).sub(0.03).abs().gt(1e-6).any()


def test_without_a_size_there_is_no_adversary(adversary: Callable):
    made, ask, _ = adversary(epsilon=1.0, weight=0.5, schedule="linear")
    made.begin(11, 10)  # all annealed away
    clean = float(ask().detach())
    assert float(made.loss(ask).detach()) == pytest.approx(1.5 * clean, rel=1e-6)
