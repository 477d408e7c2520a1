"""What PPO, DPO and merges hold next to the model that they train, part by part."""

from pathlib import Path

import msgspec
import pytest

from ftlaunch.load import load_recipe
from ftlaunch.plan.cost import costs, memory, shape, speed, words
from ftlaunch.plan.cost.costs import Cost
from ftlaunch.plan.cost.devices import Device
from ftlaunch.plan.plan import make_plan
from ftlaunch.run.spec import StageSpec

LLAMA = "meta-llama/Meta-Llama-3-8B"
CARD = Device("NVIDIA H100", True, 80 * 10**9, None, 989)
RECIPE = """
name = "ppo"
[model]
path = "meta-llama/Meta-Llama-3-8B"
[adapter]
kind = "lora"
[data.rows]
path = "owner/rows"
prompt = "{q}"
completion = "{a}"
max_length = 512
[data.pairs]
path = "owner/pairs"
format = "preference"
"""
PPO = '[[stage]]\nkind = "ppo"\ndata = "rows"\nsteps = 8\nbatch_size = 64\nmicro_batch_size = 4\n'
BY_FUNCTION = PPO + 'reward_function = "rewards.py:length"\n'


def stages(folder: Path, text: str, *settings: str) -> list[StageSpec]:
    (folder / "rewards.py").write_text("def length(prompt, answer, row):\n    return 0.0\n")
    (folder / "recipe.toml").write_text(RECIPE + text)
    return [planned.spec for planned in make_plan(load_recipe(folder / "recipe.toml", settings).recipe, folder).stages]


def told(spec: StageSpec) -> Cost:
    found = costs.of_spec(spec, CARD, 2)
    assert isinstance(found, Cost)
    return found


def parts(spec: StageSpec) -> dict[str, int]:
    return {part.name: part.bytes for part in told(spec).memory.parts}


def test_rollouts_have_a_cache_and_a_phase_of_their_own(tmp_path: Path) -> None:
    """32 answers side by side of 512 + 128 tokens, each with keys and values of 1,024 elements in 32 layers."""
    (spec,) = stages(tmp_path, BY_FUNCTION)
    found = parts(spec)
    assert found["keys and values of answers"] == 32 * (512 + 128) * 32 * 2 * 1024 * 2
    assert found["value head"] == 16 * 4097  # weight, gradient and two moments in fp32, with a bias
    assert told(spec).memory.phases["rollout"] > found["weights"] + found["keys and values of answers"]
    (few,) = stages(tmp_path, BY_FUNCTION, "stage.0.rollout_size=8", "stage.0.batch_size=8")
    assert parts(few)["keys and values of answers"] == found["keys and values of answers"] // 4


def test_vllm_keeps_its_own_cache(tmp_path: Path) -> None:
    (spec,) = stages(tmp_path, BY_FUNCTION, "stage.0.rollout_engine=vllm")
    assert "keys and values of answers" not in parts(spec)
    assert "rollout" not in told(spec).memory.phases


def test_only_full_training_copies_the_reference(tmp_path: Path) -> None:
    found = shape.read(LLAMA)
    assert found is not None
    (spec,) = stages(tmp_path, BY_FUNCTION, "adapter.kind=full")
    assert parts(spec)["reference"] == 2 * found.parameters
    (spec,) = stages(tmp_path, BY_FUNCTION)
    assert "reference" not in parts(spec)


def test_a_policy_that_goes_on_has_the_adapter_that_it_starts_from_as_reference(tmp_path: Path) -> None:
    sft = '[[stage]]\nkind = "sft"\ndata = "rows"\n'
    for text in (BY_FUNCTION, '[[stage]]\nkind = "dpo"\ndata = "pairs"\n'):
        spec = stages(tmp_path, sft + text)[1]
        assert parts(spec)["reference"] == parts(spec)["adapter"]


@pytest.mark.parametrize(("name", "remark"), [("reward", None), ("owner/reward", "no config.json of owner/reward is")])
def test_the_reward_model_counts_by_its_own_config(tmp_path: Path, name: str, remark: str | None) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"vocab_size": 100, "intermediate_size": 96, "num_key_value_heads": 4}
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward/config.json").write_bytes(msgspec.json.encode(config))
    place = str(tmp_path / name) if remark is None else name
    (spec,) = stages(tmp_path, PPO, f"stage.0.reward_model={place}")
    found = shape.of_config(config)
    assert found is not None
    assert parts(spec).get("reward model", 0) == (2 * found.parameters if remark is None else 0)
    assert any(remark in one for one in told(spec).remarks) if remark else not told(spec).remarks


def test_an_earlier_reward_stage_leaves_an_adapter_on_the_same_base(tmp_path: Path) -> None:
    spec = stages(tmp_path, '[[stage]]\nkind = "reward"\ndata = "pairs"\n' + PPO)[1]
    assert parts(spec)["reward model"] == parts(spec)["adapter"]
    assert told(spec).remarks == ["the reward model is taken for one like the policy, with the same adapter"]


def test_steps_that_share_a_rollout_share_its_time(tmp_path: Path) -> None:
    """A rollout is generated and read by policy and reference: 3 forward passes over `ppo_epochs` optimizer steps."""
    found = shape.read(LLAMA)
    assert found is not None
    one, four = (stages(tmp_path, BY_FUNCTION, f"stage.0.ppo_epochs={n}")[0] for n in (1, 4))
    (sft,) = stages(tmp_path, '[[stage]]\nkind = "sft"\ndata = "rows"\n')
    plain = speed.operations(sft, found)
    looks = [speed.operations(spec, found) - plain for spec in (one, four)]
    assert looks[0] == pytest.approx(4 * looks[1])


def test_only_a_live_reference_takes_time(tmp_path: Path) -> None:
    found = shape.read(LLAMA)
    assert found is not None
    dpo = '[[stage]]\nkind = "dpo"\ndata = "pairs"\n'
    live, kept, orpo = (
        speed.operations(stages(tmp_path, text)[0], found)
        for text in (dpo, dpo + 'reference = "precomputed"\n', dpo.replace("dpo", "orpo"))
    )
    assert kept == orpo < live


def test_a_merge_holds_one_file_and_then_one_model(tmp_path: Path) -> None:
    spec = stages(tmp_path, '[[stage]]\nkind = "sft"\ndata = "rows"\n[[stage]]\nkind = "merge"\n')[1]
    found, phases = parts(spec), told(spec).memory.phases
    assert found["model, while it is checked"] == 2 * 8_030_261_248
    assert set(phases) == {"writing", "check"}
    assert phases["check"] > phases["writing"] > 0
    # The logits of three models: of 100 tokens of fixed texts and, where rows are held out, of 8 · 64 tokens of these.
    assert found["logits of the check"] == 3 * 4 * (100 + 8 * 64) * 128_256
    (trained,) = stages(tmp_path, BY_FUNCTION)
    alone = costs.of_spec(spec, CARD, 2, merged=trained)
    assert isinstance(alone, Cost)
    assert {part.name: part.bytes for part in alone.memory.parts}["logits of the check"] == 3 * 4 * 100 * 128_256


def test_answers_at_evaluations_have_a_cache_a_phase_and_a_time(tmp_path: Path) -> None:
    text = '[[stage]]\nkind = "sft"\ndata = "rows"\nsteps = 10\nevaluate_every = 5\n'
    asked = ("data.rows.test=20", 'stage.0.eval_metrics=["rouge"]', "stage.0.eval_max_new_tokens=32")
    (plain,), (scored,) = stages(tmp_path, text), stages(tmp_path, text, *asked)
    assert "keys and values of answers" not in parts(plain)
    assert parts(scored)["keys and values of answers"] == 16 * (512 + 32) * 32 * 2 * 1024 * 2
    assert told(scored).memory.phases["answers at evaluations"] > parts(scored)["weights"]
    before, after = told(plain).time, told(scored).time
    assert before
    assert after
    assert before.total
    assert after.step == before.step
    assert after.total == pytest.approx(before.total + 2 * after.evaluation)
    assert "of that" in words.of_stage(told(scored))
    # 64 prompts of 512 tokens, 4 batches of 32 tokens that each read all weights, and the 20 rows held out.
    found = shape.read(LLAMA)
    assert found is not None
    passes = 64 * 512 + 4 * 32 * 64 + 20 * 512
    expected = passes * speed.forward_operations(scored, found) / (989e12 * 0.4)
    assert after.evaluation == pytest.approx(expected)
    (searched,) = stages(tmp_path, text, *asked, "stage.0.eval_beams=4")
    assert parts(searched)["keys and values of answers"] == 4 * parts(scored)["keys and values of answers"]


def test_an_evaluate_stage_takes_the_time_of_its_answers_by_both_models(tmp_path: Path) -> None:
    text = '[[stage]]\nkind = "sft"\ndata = "rows"\nsteps = 10\n[[stage]]\nkind = "evaluate"\ndata = "rows"\n'
    wanted = ("stage.1.prompts=32", "stage.1.max_new_tokens=10", "stage.1.beams=2")
    found = shape.read(LLAMA)
    assert found is not None
    # 32 prompts of 512 tokens, twice for two beams, and 2 batches of 10 tokens that each read all weights.
    passes = 2 * 32 * 512 + 2 * 10 * 64
    for metrics, tokens in (('["bleu"]', passes), ('["perplexity"]', 32 * 512), ('["bleu", "perplexity"]', None)):
        *_, spec = stages(tmp_path, text, *wanted, f"stage.1.metrics={metrics}")
        by_hand = (tokens or passes + 32 * 512) * speed.forward_operations(spec, found) / (989e12 * 0.4)
        time = told(spec).time
        assert time is not None
        assert time.total == pytest.approx(2 * by_hand)
    assert "time: at most about" in words.of_stage(told(spec))
    *_, unknown = stages(tmp_path, text)
    assert told(unknown).time is None


def test_rows_held_out_take_time_at_each_evaluation(tmp_path: Path) -> None:
    """An even share of them on each process: forward passes alone, of both answers of a pair and by the reference."""
    found = shape.read(LLAMA)
    assert found is not None
    file = tmp_path / "rows.jsonl"
    file.write_text('{"q": "1", "a": "1", "prompt": "1", "chosen": "1", "rejected": "2"}\n' * 50)
    text = '[[stage]]\nkind = "{}"\ndata = "rows"\nsteps = 10\nevaluate_every = 4\nbatch_size = 4\n'
    (sft,) = stages(tmp_path, text.format("sft"), f"data.rows.path={file}", "data.rows.test=0.2")
    of_row = 512 * speed.forward_operations(sft, found) / (989e12 * 0.4)
    time = told(sft).time
    assert time
    assert time.evaluation == pytest.approx(10 / sft.world_size * of_row)
    assert time.total == pytest.approx(10 * time.step + 3 * time.evaluation)
    pairs = text.replace('"rows"', '"pairs"')
    held = ("data.pairs.test=8", "data.pairs.max_length=512")
    dpo, orpo = (told(stages(tmp_path, pairs.format(kind), *held)[0]).time for kind in ("dpo", "orpo"))
    assert dpo
    assert orpo
    assert orpo.evaluation == pytest.approx(8 * 2 * of_row)
    assert dpo.evaluation == pytest.approx(2 * orpo.evaluation)
    (hub,) = stages(tmp_path, text.format("sft"), "data.rows.test=0.2")
    assert "rows held out, which are not counted here, take more" in words.of_stage(told(hub))
    assert "take more" not in words.of_stage(told(sft))


def test_dora_also_keeps_results_that_nothing_else_does(tmp_path: Path) -> None:
    """Of queries, keys, attention's output and the MLP's: 4,096 + 1,024 + 2 · 4,096 elements per token and layer."""
    text = '[[stage]]\nkind = "sft"\ndata = "rows"\nbatch_size = 1\n'
    lora, dora = (
        parts(stages(tmp_path, text, f"adapter.kind={kind}", "adapter.dropout=0")[0]) for kind in ("lora", "dora")
    )
    assert dora["activations"] - lora["activations"] == 512 * 32 * 2 * (4096 + 1024 + 2 * 4096)


def test_pages_that_the_kernel_can_take_back_are_no_need(tmp_path: Path) -> None:
    """Quantized on a CPU in the format of the file, the matrices of the file stay mapped; under DDP nothing does."""
    text = '[[stage]]\nkind = "sft"\ndata = "rows"\n'
    asked = ("model.quantization=nf4", "model.dtype=bf16")
    alone, shared = (
        costs.of_spec(stages(tmp_path, text, *asked, *more)[0], Device("the CPU", False), 2)
        for more in ((), ("parallel.procs_per_node=2", "parallel.strategy=ddp"))
    )
    assert isinstance(alone, Cost)
    assert isinstance(shared, Cost)
    found = shape.read(LLAMA)
    assert found is not None
    assert alone.memory.lingering == 2 * found.matrix_parameters
    assert alone.memory.needed <= alone.memory.peak - alone.memory.lingering
    assert shared.memory.lingering == 0


def test_sft_keeps_what_the_dropout_of_the_models_own_config_needs(tmp_path: Path) -> None:
    """GPT-2's 12 heads keep three rows of probabilities for each token on a CPU; DPO turns dropout off."""
    texts = ('[[stage]]\nkind = "sft"\ndata = "rows"\n', '[[stage]]\nkind = "orpo"\ndata = "pairs"\n')
    asked = ("model.path=openai-community/gpt2", "data.pairs.max_length=512", "stage.0.batch_size=1")
    sizes: list[dict[float, int]] = []
    for text in texts:
        (spec,) = stages(tmp_path, text, *asked)
        found = shape.of_config({"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257})
        assert found is not None
        kept: dict[float, int] = {}
        for rate in (0.0, 0.1):
            one = msgspec.structs.replace(found, attention_dropout=bool(rate), hidden_dropout=bool(rate))
            told = memory.of_stage(spec, one, 4, cuda=False)
            kept[rate] = next(part.bytes for part in told.parts if part.name == "activations")
        sizes.append(kept)
    sft, orpo = sizes
    assert sft[0.1] - sft[0.0] == 512 * 12 * 4 * (3 * 12 * 512 + 2 * 768)
    assert orpo[0.1] == orpo[0.0]
