"""Every kind of adapter on models of six families: its start, its training, its artifact in plain peft, its merge."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from tests.trainer import in_process
from tests.trainer.adapters.conftest import FAMILIES, IDS, base_of, logits
from tests.zoo.families import build
from transformers import AutoConfig, AutoModelForCausalLM

from ftlaunch.errors import UserError
from ftlaunch.recipe.adapter import Adalora, Adapter, Dora, Full, Lora, Pissa, Prompt, Rslora
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.model import Model
from ftlaunch.recipe.stages import Dpo, Merge
from ftlaunch.recipe.types import kinds
from ftlaunch.run.files import read_jsonl
from fttrain import adapters
from fttrain.adapters import dora, targets
from fttrain.merging.merge import find_source, merge
from fttrain.model.scorer import load_base

LOW_RANK: dict[str, Adapter] = {
    "lora": Lora(rank=4, alpha=8),
    "rslora": Rslora(rank=4, alpha=8),
    "dora": Dora(rank=4, alpha=8),
    "pissa": Pissa(rank=4, alpha=8),
    "adalora": Adalora(rank=4, alpha=8),
}
PEFT: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", LOW_RANK)
def test_an_artifact_is_plain_peft_on_the_untouched_base_and_merges(
    kind: str, name: str, family: Callable[[str], Path], trained: Callable, tmp_path: Path
) -> None:
    made = trained(family(name), LOW_RANK[kind])
    assert made.losses[2] < made.losses[0]
    base = base_of(family(name))
    before = logits(base)
    loaded = logits(PeftModel.from_pretrained(base, made.artifact))
    torch.testing.assert_close(loaded, made.logits, atol=2e-5, rtol=1e-4)
    assert (loaded - before).abs().max() > 1e-3
    merged = merge(find_source(made.artifact), tmp_path / "merged", Merge())
    assert merged.kl < 1e-7
    torch.testing.assert_close(logits(base_of(tmp_path / "merged")), made.logits, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("adapter", [Lora(rank=4), Pissa(rank=4), Prompt(virtual_tokens=5)], ids=lambda one: type(one))
def test_plain_peft_is_told_the_bases_revision(adapter: Adapter, family: Callable[[str], Path], trained: Callable):
    packing = not isinstance(adapter, Prompt)
    made = trained(family("llama"), adapter, packing=packing, model_fields={"revision": "v1"})
    assert PeftConfig.from_pretrained(made.artifact).revision == "v1"


@pytest.mark.parametrize("kind", LOW_RANK)
def test_over_weights_in_4_bits(kind: str, family: Callable[[str], Path], trained: Callable) -> None:
    def base() -> Any:
        spec = Model(path=str(family("qwen2")), dtype="fp32", quantization="nf4")
        return load_base(spec, dtype=torch.float32, packing=False)

    begun: Any = adapters.attach(base(), LOW_RANK[kind], None, in_fp32=True)
    torch.testing.assert_close(logits(begun), logits(base()), atol=1e-5, rtol=1e-5)
    made = trained(family("qwen2"), LOW_RANK[kind], model_fields={"quantization": "nf4"})
    assert made.losses[2] < made.losses[0]
    loaded = logits(PeftModel.from_pretrained(base(), made.artifact))
    torch.testing.assert_close(loaded, made.logits, atol=2e-5, rtol=1e-4)


def test_dora_over_weights_in_8_bits_merges(family: Callable[[str], Path], trained: Callable, tmp_path: Path) -> None:
    """Plain peft, which the merged model is compared with, reads each weight once more in every pass."""
    made = trained(family("qwen2"), LOW_RANK["dora"], model_fields={"quantization": "int8"})
    merged = merge(find_source(made.artifact), tmp_path / "merged", Merge())
    assert merged.kl < 1e-3


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", LOW_RANK)
def test_an_adapter_begins_as_the_base(kind: str, name: str, family: Callable[[str], Path]) -> None:
    base = base_of(family(name))
    before = logits(base)
    model: Any = adapters.attach(base, LOW_RANK[kind], None, in_fp32=True)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    assert any(parameter.requires_grad for parameter in model.parameters())


def shaken(model: Any) -> Any:
    """The same weights for any model of one shape, none of them as they begin."""
    with torch.no_grad():
        for name, parameter in sorted((name, p) for name, p in model.named_parameters() if p.requires_grad):
            torch.manual_seed(len(name) + parameter.numel())
            noise = torch.randn_like(parameter) * 0.1
            parameter.copy_(noise if parameter.dim() > 1 else parameter * (1 + noise))
    return model


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model(IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: Any, theirs: Any) -> None:
    mine, other = gradients(ours), gradients(theirs)
    assert mine.keys() == other.keys()
    assert len(mine) > 10
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, other[name], atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_dora_is_pefts_forwards_and_backwards(name: str, family: Callable[[str], Path]) -> None:
    ours = shaken(adapters.attach(base_of(family(name)), LOW_RANK["dora"], None, in_fp32=True))
    theirs = shaken(get_peft_model(base_of(family(name)), LoraConfig(**PEFT, use_dora=True)))
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-4)
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_pissa_is_pefts_forwards_and_backwards(name: str, family: Callable[[str], Path]) -> None:
    ours = adapters.attach(base_of(family(name)), LOW_RANK["pissa"], None, in_fp32=True)
    theirs = get_peft_model(base_of(family(name)), LoraConfig(**PEFT, init_lora_weights="pissa"))
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-4)
    assert_same_gradients(ours, theirs)


def test_an_iterated_start_is_close_to_the_exact_one() -> None:
    from fttrain.adapters.pissa import principal

    torch.manual_seed(0)
    weight = torch.randn(40, 60) @ torch.diag(0.9 ** torch.arange(60.0))
    (a, b), (a_2, b_2) = principal(weight, 4, 2.0, None), principal(weight, 4, 2.0, 16)
    torch.testing.assert_close(b @ a, b_2 @ a_2, atol=1e-3, rtol=1e-3)
    u, s, vt = torch.linalg.svd(weight)
    torch.testing.assert_close(2 * b @ a, u[:, :4] @ torch.diag(s[:4]) @ vt[:4])


def test_pissa_of_a_rank_that_a_weight_has_not_is_refused(family: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="rank 33"):
        adapters.attach(base_of(family("llama")), Pissa(rank=33), None, in_fp32=True)


def test_a_row_of_zeros_is_trained_under_dora_and_plain_peft_agrees(
    family: Callable[[str], Path], tmp_path: Path
) -> None:
    base = base_of(family("llama"))
    with torch.no_grad():
        base.model.layers[0].mlp.down_proj.weight[3] = 0
    base.save_pretrained(tmp_path / "base")
    before = logits(base)
    model: Any = adapters.attach(base, LOW_RANK["dora"], None, in_fp32=True)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    found = gradients(model)
    assert all(gradient.isfinite().all() for gradient in found.values())
    name, lengths = next(
        item for item in model.named_parameters() if "layers.0.mlp.down_proj.lora_magnitude" in item[0]
    )
    losses = []
    for length in (0.01, -0.01, 0.0):
        with torch.no_grad():
            lengths[3] = length
        losses.append(model(IDS, labels=IDS).loss.item())
    assert found[name][3].item() == pytest.approx((losses[0] - losses[1]) / 0.02, rel=0.01)
    assert found[name][3].abs() > 1e-4
    adapters.save(
        model, LOW_RANK["dora"], {k: v.data for k, v in model.named_parameters() if v.requires_grad}, tmp_path
    )
    plain = PeftModel.from_pretrained(base_of(tmp_path / "base"), tmp_path)
    torch.testing.assert_close(logits(plain), before, atol=1e-5, rtol=1e-5)


def test_doras_norm_needs_no_product() -> None:
    """Against the norm of the sum itself, row by row."""
    torch.manual_seed(1)
    layer = torch.nn.Linear(30, 20, bias=True)
    wrapper: Any = get_peft_model(torch.nn.Sequential(layer), LoraConfig(r=3, target_modules=["0"], use_dora=True))
    lora = wrapper.base_model.model[0]
    torch.nn.init.normal_(lora.lora_B["default"].weight)
    dora.install(wrapper, "default", fresh=False)
    a, b = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    expected = (layer.weight + lora.scaling["default"] * b @ a).norm(dim=1)
    magnitude = lora.lora_magnitude_vector["default"]
    torch.testing.assert_close(magnitude._norm(layer, torch.float32), expected)


def test_dropout_reaches_the_product_alone(family: Callable[[str], Path]) -> None:
    model: Any = adapters.attach(base_of(family("llama")), Dora(dropout=0.9), None, in_fp32=True)
    before = logits(model)
    with torch.no_grad():
        torch.testing.assert_close(model.train()(IDS).logits, before)  # B is zero


GPT2_COUNTS = {
    r"transformer\.h\.(2\.mlp|11\.attn)\.c_proj": (None, 21_504),
    "all-linear": (None, 589_824),
    "c_attn": (None, 147_456),
    "all-linear in two": ([2, 11], 98_304),
}


@pytest.mark.parametrize("which", GPT2_COUNTS)
def test_trainable_parameters_of_gpt2(which: str) -> None:
    layers, expected = GPT2_COUNTS[which]
    aims: Any = ["c_attn"] if which == "c_attn" else which.removesuffix(" in two")
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2"))
        model = adapters.attach(base, Lora(rank=4, targets=aims, layers=layers), None, in_fp32=True)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == expected


class TestTargets:
    @pytest.fixture
    def model(self, family: Callable[[str], Path]) -> Any:
        return base_of(family("llama"))

    def test_all_linear_is_pefts_all_linear(self, model: Any) -> None:
        ours = set(targets.names(model, Lora()))
        theirs = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
        found = {
            name.removeprefix("base_model.model.")
            for name, module in theirs.named_modules()
            if hasattr(module, "lora_A")
        }
        assert ours == found

    @pytest.mark.parametrize(
        ("layers", "expected"),
        [
            ([0, 5], [0, 5]),
            ("top:2", [4, 5]),
            ("every:3", [2, 5]),
            ("every:1", list(range(6))),
            ("top:6", list(range(6))),
        ],
    )
    def test_layers(self, layers: Any, expected: list[int]) -> None:
        assert targets.numbers(layers, 6) == expected

    def test_layers_pick_among_targets(self, model: Any) -> None:
        found = targets.names(model, Lora(targets=["q_proj", "down_proj"], layers="top:1"))
        assert found == ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"]

    @pytest.mark.parametrize(
        ("adapter", "message"),
        [
            (Lora(targets=["q_proj", "query"]), "'query'"),
            (Lora(targets=".*query.*"), "query"),
            (Lora(targets=["self_attn"]), "'self_attn'"),
            (Dora(targets=["embed_tokens"]), "embed_tokens"),
            (Lora(layers=[2]), "no layer 2"),
            (Lora(layers="top:3"), "has 2 layers"),
            (Lora(targets=["lm_head"], layers="top:1"), "none of them is in a layer"),
        ],
    )
    def test_what_is_not_there_is_named(self, adapter: Lora, message: str, model: Any) -> None:
        with pytest.raises(UserError, match=message):
            targets.names(model, adapter)

    def test_candidates_are_named(self, model: Any) -> None:
        with pytest.raises(UserError) as caught:
            targets.names(model, Lora(targets=["query_key_value"]))
        assert "all-linear" in caught.value.remedy
        assert "q_proj" in caught.value.remedy


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_is_computed_backwards_below_the_lowest_adapted_layer(
    checkpointing: bool, family: Callable[[str], Path], trained: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, list[bool]] = {0: [], 1: []}
    attach = adapters.attach

    def watch(base: Any, *arguments: Any, **options: Any) -> Any:
        for number, layer in enumerate(base.model.layers):
            layer.register_forward_hook(
                lambda _module, _inputs, out, number=number: seen[number].append(
                    (out[0] if isinstance(out, tuple) else out).requires_grad
                )
            )
        return attach(base, *arguments, **options)

    monkeypatch.setattr(adapters, "attach", watch)
    trained(family("llama"), Lora(layers="top:1"), activation_checkpointing=checkpointing)
    assert True in seen[1]
    assert True not in seen[0]


@pytest.mark.parametrize("kind", ["dora", "pissa", "adalora"])
def test_dpo_goes_on_as_sft_has_left_it(
    kind: str, family: Callable[[str], Path], rows_file: Path, pairs: Data, tmp_path: Path
) -> None:
    """Its reference, a frozen copy, says the same at first; with nothing learnt so does its artifact."""
    rows = Data(path=str(rows_file), prompt="{question}", completion="{answer}")
    settings: dict[str, Any] = {"adapter": LOW_RANK[kind], "steps": 2}
    first = in_process.train(in_process.make_step(family("qwen2"), rows, **settings), tmp_path)
    settings |= {"kind": Dpo, "start": f"{first.name}/artifact", "learning_rate": 1e-12}
    second = in_process.train(in_process.make_step(family("qwen2"), pairs, **settings), tmp_path)
    lines = [line for line in read_jsonl(second.metrics) if "loss" in line]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[0]["grad_norm"] > 1e-3
    one, two = (logits(PeftModel.from_pretrained(base_of(family("qwen2")), s.artifact)) for s in (first, second))
    torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-4)


def test_each_kind_has_its_module() -> None:
    assert {"full", *adapters.MODULES} == {*kinds(Adapter)}
    for kind in get_args(Adapter):
        if kind is not Full:
            assert adapters._method(kind()).adapter == kind()


def test_targets_that_are_stacked_experts_lead_to_their_own_key(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(build("qwen3_moe", tmp_path))
    with pytest.raises(UserError, match="'gate_up_proj'") as told:
        targets.names(model, Lora(targets=["gate_up_proj"]))
    assert "experts = true" in told.value.remedy


def test_a_head_that_is_called_decoder_is_not_taken_for_the_body(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(build("modernbert-decoder", tmp_path))
    assert all(name.startswith("model.layers.") for name in targets.names(model, Lora()))
