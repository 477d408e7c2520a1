"""Scores of chosen tokens against the models' own logits, in value and gradient."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from ftlaunch.errors import UserError
from fttrain.data import segments
from fttrain.data.batches import MicroBatch, collate
from fttrain.data.token_set import Group
from fttrain.model import attention
from fttrain.model.scorer import Scorer
from fttrain.noise import neftune
from fttrain.objectives import logps

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "gpt2": GPT2Config(
        vocab_size=90,
        n_embd=32,
        n_layer=2,
        n_head=4,
        attn_pdrop=0,
        embd_pdrop=0,
        resid_pdrop=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "cohere": CohereConfig(**SHAPE, logit_scale=0.3),
    "granite": GraniteConfig(**SHAPE, logits_scaling=3.0),
}

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
WITHIN_LIMITS = {
    "window": MistralConfig(**SHAPE, sliding_window=7),
    "window, caps": Gemma2Config(
        **SHAPE, head_dim=8, sliding_window=5, attn_logit_softcapping=5.0, final_logit_softcapping=3.0
    ),
    "window, sinks": GptOssConfig(**SHAPE, **EXPERTS, head_dim=8, sliding_window=6),
    "chunks": Llama4TextConfig(
        **SHAPE, num_local_experts=2, head_dim=8, attention_chunk_size=9, layer_types=["chunked_attention"] * 2
    ),
}

LATENT = DeepseekV3Config(
    **(
        SHAPE
        | {"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    ),
    **{"q_lora_rank": None, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    **{"moe_intermediate_size": 16, "first_k_dense_replace": 1},
)
"""Its values are half as wide as its queries."""


@pytest.fixture(scope="module")
def rows() -> list[tuple[np.ndarray, np.ndarray]]:
    draw = np.random.default_rng(0)
    return [(draw.integers(3, 90, n).astype(np.int32), draw.random(n) < 0.5) for n in (5, 17, 16, 2, 40, 1, 9)]


def laid(rows: list, *, packing: bool = True) -> MicroBatch:
    return collate([Group((row,)) for row in rows], packing=packing, chunks=1, device=CPU)


def by_hand(model: torch.nn.Module, rows: list, smoothing: float = 0.0) -> torch.Tensor:
    """Sum of the trained tokens' cross-entropies, row by row, from full logits and torch's own loss."""
    total = torch.zeros(())
    for ids, trained in rows:
        wide = torch.from_numpy(ids.astype(np.int64))
        labels = torch.where(torch.from_numpy(trained), wide, -100)
        logits = model(wide[None]).logits[0].float()
        if len(ids) > 1:
            total = total + F.cross_entropy(logits[:-1], labels[1:], reduction="sum", label_smoothing=smoothing)
    return total


@pytest.mark.parametrize("trained_head", [True, False])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_cross_entropy_of_full_logits(family: str, packing: bool, trained_head: bool, rows: list):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation="eager").train()
    model.get_output_embeddings().requires_grad_(trained_head)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    parameters = [dict(model.named_parameters())[name] for name in names]
    expected = by_hand(model, rows, smoothing=0.1)
    expected_grads = torch.autograd.grad(expected, parameters)

    model.set_attn_implementation(attention.NAME if packing else "sdpa")
    scorer = Scorer(model, smoothing=0.1)
    loss = -scorer(laid(rows, packing=packing)).smoothed_N.sum()
    grads = torch.autograd.grad(loss, parameters)

    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, ours, theirs in zip(names, grads, expected_grads, strict=True):
        assert torch.allclose(ours, theirs, atol=2e-5), name


@pytest.fixture(scope="module")
def pairs() -> list[Group]:
    """Pairs of very different lengths: of prompts, of answers, and of what the answers have in common."""
    draw = np.random.default_rng(1)
    groups = []
    for prompt, same, chosen, rejected in ((30, 0, 5, 9), (3, 0, 1, 12), (28, 2, 6, 8), (1, 0, 4, 4), (30, 1, 5, 1)):
        begin = draw.integers(3, 90, prompt + same)
        ends = [np.append(token, draw.integers(3, 90, size)) for token, size in ((1, chosen), (2, rejected))]
        rows = [np.concatenate([begin, end]).astype(np.int32) for end in ends]
        groups.append(Group(tuple((ids, np.arange(len(ids)) >= prompt) for ids in rows)))
    return groups


@pytest.mark.parametrize("trained_head", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_that_share_their_prompt_score_as_if_they_did_not(family: str, trained_head: bool, pairs: list[Group]):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation="sdpa").train()
    model.get_output_embeddings().requires_grad_(trained_head)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    scorer = Scorer(model)

    def told(*, packing: bool, share: bool) -> tuple[MicroBatch, torch.Tensor, tuple[torch.Tensor, ...]]:
        model.set_attn_implementation(attention.NAME if packing else "sdpa")
        micro = collate(pairs, packing=packing, share=share, chunks=1, device=CPU)
        logps_N = scorer(micro).smoothed_N
        weights_N = torch.sin(micro.row_ids_N + 1.0)  # a different upstream gradient for every answer
        return micro, logps_N, torch.autograd.grad((logps_N * weights_N).sum(), parameters)

    plain_micro, plain_N, plain_grads = told(packing=False, share=False)
    for share in (False, True):
        micro, logps_N, grads = told(packing=True, share=share)
        assert micro.tokens == plain_micro.tokens == sum(len(ids) for group in pairs for ids, _ in group.rows)
        assert torch.equal(micro.row_ids_N, plain_micro.row_ids_N)
        assert torch.equal(
            micro.input_ids.flatten()[micro.last_token_B], plain_micro.input_ids.flatten()[plain_micro.last_token_B]
        )
        assert torch.allclose(logps_N, plain_N, atol=1e-5)
        assert all(torch.allclose(ours, theirs, atol=2e-5) for ours, theirs in zip(grads, plain_grads, strict=True))
    assert micro.input_ids.numel() == micro.tokens - 30 - 3 - 30 - 1 - 31


@pytest.mark.parametrize("family", WITHIN_LIMITS)
def test_what_limits_or_changes_attention_is_computed_in_packed_rows(
    family: str, rows: list, pairs: list[Group], monkeypatch: pytest.MonkeyPatch
):
    """Windows, chunks, caps and sinks, over rows and prompts that are longer than the limits, in value and gradient."""
    monkeypatch.setattr(segments, "TILE", 6)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(WITHIN_LIMITS[family], attn_implementation="eager").train()
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.normal_(parameter)
    of_pairs = [row for group in pairs for row in group.rows]
    for expected_rows, groups in ((rows, [Group((row,)) for row in rows]), (of_pairs, pairs)):
        model.set_attn_implementation("eager")
        expected = by_hand(model, expected_rows)
        expected_grads = torch.autograd.grad(expected, list(model.parameters()))
        model.set_attn_implementation(attention.NAME)
        loss = -Scorer(model)(collate(groups, packing=True, share=True, chunks=1, device=CPU)).smoothed_N.sum()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        assert all(torch.allclose(ours, theirs, atol=2e-5) for ours, theirs in zip(grads, expected_grads, strict=True))


def by_sequence(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    most_queries: int,
    most_keys: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """`varlen_attn` as its documentation has it, in plain torch: the last query of a sequence sees its last key."""
    assert queries.dtype == keys.dtype == torch.int32
    assert query.shape[-1] == key.shape[-1] == value.shape[-1]
    assert (int(queries.diff().max()), int(keys.diff().max())) == (most_queries, most_keys)
    outputs = []
    counts_q, counts_k = (bounds.diff().tolist() for bounds in (queries, keys))
    for q, k, v in zip(query.split(counts_q), key.split(counts_k), value.split(counts_k), strict=True):
        back = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        left, right = window_size
        seen = (back >= -right) & ((back <= left) | (left < 0))
        q, k, v = (one.transpose(0, 1) for one in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=enable_gqa)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("family", ["whole", "window", "chunks", "narrow values"])
def test_what_a_kernel_of_many_lengths_is_told_is_what_each_row_sees(
    family: str, rows: list, pairs: list[Group], monkeypatch: pytest.MonkeyPatch
):
    """All but the kernel itself, which needs a GPU: bounds, keys of prefixes, windows, chunks, widths."""
    torch.manual_seed(1)
    config = {"whole": FAMILIES["llama"], "narrow values": LATENT, **WITHIN_LIMITS}[family]
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    of_pairs = [row for group in pairs for row in group.rows]
    expected = [float(by_hand(model, of)) for of in (rows, of_pairs)]
    model.set_attn_implementation(attention.NAME)
    monkeypatch.setattr(varlen, "varlen_attn", by_sequence)
    monkeypatch.setattr(attention, "_has_kernel", lambda *_: True)
    for groups, sum_ in zip(([Group((row,)) for row in rows], pairs), expected, strict=True):
        scores = Scorer(model)(collate(groups, packing=True, share=True, chunks=1, device=CPU))
        assert -float(scores.smoothed_N.sum()) == pytest.approx(sum_, rel=1e-6)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation within returns."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.size = max([self.size, *(one.numel() for one in tree_leaves(made) if isinstance(one, torch.Tensor))])
        return made


@pytest.mark.parametrize(("family", "packing"), [("whole", True), ("whole", False), ("window", True), ("chunks", True)])
def test_no_mask_of_a_whole_line_is_made(family: str, packing: bool):
    config = {"whole": FAMILIES["llama"], **WITHIN_LIMITS}[family]
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME if packing else "sdpa")
    tokens = 6000
    rows = [(np.arange(tokens, dtype=np.int32) % 80 + 3, np.arange(tokens) > tokens - 9)]
    with Largest() as largest:
        (-Scorer(model)(laid(rows, packing=packing)).smoothed_N.sum()).backward()
    assert 32 * tokens <= largest.size < tokens**2 / 20


def test_what_attention_is_asked_for_and_does_not_compute_is_refused_by_name(rows: list):
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"], attn_implementation=attention.NAME)
    of_rows = laid(rows, packing=True).segments
    assert of_rows is not None
    heads = torch.zeros(1, 4, of_rows.tokens, 8)
    with attention.over(of_rows, torch.arange(of_rows.tokens)[None]) as made:
        mask = attention.RowMask(made, segments.WHOLE)
        with pytest.raises(attention.Unpackable, match="asks its attention for block_indices"):
            attention.attend(model, heads, heads, heads, mask, block_indices=torch.zeros(1))
        with pytest.raises(attention.Unpackable, match="does not hand its layers the mask"):
            attention.attend(model, heads, heads, heads, None)
        with pytest.raises(attention.Unpackable, match="computes with the attention mask itself"):
            heads + mask


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (BloomConfig(vocab_size=90, hidden_size=32, n_layer=2, n_head=4), "attends by code of its own"),
        (Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"]), "carries a state from token to token"),
    ],
)
def test_packed_rows_are_refused_by_a_model_that_would_mix_them(config: PreTrainedConfig, why: str, rows: list):
    told = attention.NAME if config.model_type == "lfm2" else None
    scorer = Scorer(AutoModelForCausalLM.from_config(config, attn_implementation=told))
    with pytest.raises(UserError, match=f"{config.model_type} cannot be trained on packed rows: it {why}"):
        scorer(laid(rows, packing=True))


def test_a_row_never_sees_another(rows: list):
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"], attn_implementation=attention.NAME)
    scorer = Scorer(model).eval()
    everything = laid(rows, packing=True)
    changed = [(ids.copy(), trained) for ids, trained in rows]
    changed[4][0][:] = 7
    before = scorer(everything).logps_N
    after = scorer(laid(changed, packing=True)).logps_N
    counts = [int(trained[1:].sum()) for _, trained in rows]
    ends = np.cumsum(counts)
    of_row_4 = slice(int(ends[3]), int(ends[4]))
    assert not torch.allclose(before[of_row_4], after[of_row_4])
    before[of_row_4] = after[of_row_4] = 0
    assert torch.allclose(before, after, atol=1e-6)


@pytest.mark.parametrize("trained_head", [True, False])
def test_chunks_change_nothing(trained_head: bool, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(2)
    hidden = torch.randn(23, 8, requires_grad=True)
    targets = torch.randint(0, 50, (23,))
    head = torch.nn.Linear(8, 50).requires_grad_(trained_head)
    weights = torch.randn(23)  # a different upstream gradient for every token, as DPO has
    found = []
    for size, rows, chunks in ((1024, 128, 1), (1024, 4, 1), (5, 2, 1), (5, 128, 9)):
        monkeypatch.setattr(logps, "CHUNK", size)
        monkeypatch.setattr(logps, "ROWS", rows)
        scores = logps.score(hidden, targets, head, trained_head=trained_head, chunks=chunks, smoothing=0.2)
        wanted = [hidden, *(head.parameters() if trained_head else [])]
        found.append((scores, torch.autograd.grad((scores.smoothed_N * weights).sum(), wanted)))
    (first, first_grads), *others = found
    for scores, grads in others:
        assert torch.allclose(scores.smoothed_N, first.smoothed_N, atol=1e-6)
        assert torch.equal(scores.correct_N, first.correct_N)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(grads, first_grads, strict=True))


def test_logits_of_untrained_tokens_are_never_made(rows: list):
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"], attn_implementation=attention.NAME)
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].shape[-2]))
    micro = laid(rows, packing=True)
    Scorer(model)(micro)
    assert sum(seen) == micro.targets_N.numel() < micro.tokens


def test_no_rows_make_a_graph_with_zero_gradients():
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"], attn_implementation=attention.NAME)
    scores = Scorer(model)(collate([], packing=True, chunks=2, device=CPU))
    assert scores.smoothed_N.numel() == 0
    scores.smoothed_N.sum().backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_neftune_noise_has_the_papers_scale_and_is_off_in_evaluation(rows: list):
    alpha = 5.0
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"], attn_implementation=attention.NAME)
    scorer = Scorer(model)
    neftune.add(model.get_input_embeddings(), scorer.places, alpha=alpha, kind="uniform")
    added: list[torch.Tensor] = []
    clean = model.get_input_embeddings().weight.detach()
    micro = laid(rows, packing=True)

    def keep(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> None:
        added.append((output - clean[micro.input_ids]).detach())

    model.get_input_embeddings().register_forward_hook(keep)
    scorer.train()(micro)
    limit = alpha / (micro.lengths * clean.shape[1]).sqrt()
    share = (added[0].abs() / limit[..., None]).flatten()
    assert share.max() <= 1 + 1e-4
    assert share.mean() == pytest.approx(0.5, abs=0.02)
    scorer.eval()(micro)
    assert not added[1].any()


def test_entropy_and_its_gradient_come_with_the_scores(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(4)
    hidden, targets = torch.randn(23, 8, requires_grad=True), torch.randint(0, 50, (23,))
    head = torch.nn.Linear(8, 50).requires_grad_(False)
    monkeypatch.setattr(logps, "CHUNK", 5)
    scores = logps.score(hidden, targets, head, trained_head=False, chunks=6, with_entropy=True)
    log_p = head(hidden).log_softmax(-1)
    expected = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(scores.entropy_N, expected)
    chosen = log_p.gather(1, targets[:, None])[:, 0]
    (ours,) = torch.autograd.grad((scores.smoothed_N + 0.3 * scores.entropy_N).sum(), hidden)
    (theirs,) = torch.autograd.grad((chosen + 0.3 * expected).sum(), hidden)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert logps.score(hidden, targets, head, trained_head=False).entropy_N.numel() == 0
