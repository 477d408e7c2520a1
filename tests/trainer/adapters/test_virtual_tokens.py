"""Virtual tokens: trained, saved, loaded by plain peft, gone on with; what they begin as; what answers with them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.trainer import in_process
from tests.trainer.adapters.conftest import FAMILIES, IDS, Trained, base_of, logits, rows_of_ids, some_rows
from transformers import AutoTokenizer

from ftlaunch.errors import UserError
from ftlaunch.recipe.adapter import Adapter, Prefix, Prompt, PTuning
from ftlaunch.recipe.data import Data
from ftlaunch.recipe.stages import Dpo, Merge
from fttrain import adapters
from fttrain.merging.merge import find_source, merge
from fttrain.tools import chat

VIRTUAL: dict[str, Adapter] = {
    "prompt": Prompt(virtual_tokens=5),
    "prefix": Prefix(virtual_tokens=5),
    "projected": Prefix(virtual_tokens=5, projection=True, hidden_size=24),
    "mlp": PTuning(virtual_tokens=5, hidden_size=24),
    "lstm": PTuning(virtual_tokens=5, encoder="lstm", encoder_layers=1),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", VIRTUAL)
def test_an_artifact_is_plain_peft_and_is_not_merged(
    kind: str, name: str, family: Callable[[str], Path], trained: Callable[..., Trained], tmp_path: Path
) -> None:
    made = trained(family(name), VIRTUAL[kind], packing=False)
    assert made.losses[2] < made.losses[0]
    loaded = logits(PeftModel.from_pretrained(base_of(family(name)), made.artifact))
    assert loaded.shape[1] == IDS.shape[1] + (0 if isinstance(VIRTUAL[kind], Prefix) else 5)
    torch.testing.assert_close(loaded, made.logits, atol=2e-5, rtol=1e-4)
    with pytest.raises(UserError, match="only low-rank adapters are merged"):
        merge(find_source(made.artifact), tmp_path / "merged", Merge())


def test_a_row_is_scored_as_behind_its_tokens_alone(family: Callable[[str], Path], trained: Callable) -> None:
    """The trainer's losses of padded rows against plain peft's of each row by itself."""
    for kind in ("prompt", "prefix"):
        made = trained(family("llama"), VIRTUAL[kind], packing=False)
        plain: Any = PeftModel.from_pretrained(base_of(family("llama")), made.artifact).eval()
        expected = [plain(ids[None]).logits[0, -len(ids) :] for ids in rows_of_ids()]
        expected = [
            torch.nn.functional.cross_entropy(row[3:-1], ids[4:], reduction="none")
            for row, ids in zip(expected, rows_of_ids(), strict=True)
        ]
        with torch.no_grad():
            scores = made.scorer.eval()(some_rows(packing=False))
        torch.testing.assert_close(-scores.logps_N, torch.cat(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["prompt", "projected", "mlp"])
def test_a_stage_goes_on_from_what_it_finds(kind: str, family: Callable[[str], Path], trained: Callable) -> None:
    made = trained(family("llama"), VIRTUAL[kind], packing=False)
    again: Any = adapters.attach(base_of(family("llama")), VIRTUAL[kind], made.artifact, in_fp32=True)
    torch.testing.assert_close(logits(again), made.logits, atol=1e-5, rtol=1e-4)
    assert sum(p.numel() for p in again.parameters() if p.requires_grad) > 5 * 32 - 1


def test_what_prompts_begin_as(family: Callable[[str], Path]) -> None:
    def begun(**keys: Any) -> torch.Tensor:
        torch.manual_seed(0)
        model: Any = adapters.attach(base_of(family("llama")), Prompt(virtual_tokens=6, **keys), None, in_fp32=True)
        return model.prompt_encoder["default"].embedding.weight.detach()

    table = base_of(family("llama")).get_input_embeddings().weight.detach()
    ids = AutoTokenizer.from_pretrained(family("llama"))("red!").input_ids
    assert torch.equal(begun(init="text", text="red!"), table[[*ids, *ids[:2]]])
    assert all((row == table).all(1).any() for row in begun(init="vocabulary"))
    noise = begun(init="random")
    assert not any((row == table).all(1).any() for row in noise)
    assert noise.std() == pytest.approx(float(table.std()), rel=0.3)


def test_chat_answers_with_them(family: Callable[[str], Path], trained: Callable) -> None:
    for kind in ("prompt", "prefix"):
        made = trained(family("llama"), VIRTUAL[kind], packing=False)
        model, tokenizer = chat.load(str(made.artifact))
        assert isinstance(chat.say(model, tokenizer, [{"role": "user", "content": "kettle"}], 4), str)


def test_dpo_asks_the_policy_that_it_starts_from(family: Callable[[str], Path], pairs: Data, tmp_path: Path) -> None:
    stage: dict[str, Any] = {"kind": Dpo, "packing": False, "share_prompt": False, "steps": 2}
    step = in_process.make_step(family("llama"), pairs, adapter=VIRTUAL["prompt"], **stage)
    metrics = (in_process.train(step, tmp_path).metrics).read_text().splitlines()
    assert '"loss": 0.6931' in metrics[0]
