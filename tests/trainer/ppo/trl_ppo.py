"""What TRL 1.12's PPOTrainer makes of one rollout, to be compared with: writes trl_ppo.json next to this file.

TRL 1.16, which the tests have, has no PPO any more, so its last trainer runs from a folder of its own:

    pip install --no-deps --target build/trl trl==1.12.0
    PYTHONPATH=build/trl:. python -m tests.trainer.ppo.trl_ppo

A tiny policy, reference, reward and value model, all of random weights; answers of full length, as TRL gives the score
of a shorter one to the token after its last. Everything is taken from the variables of its own loop.
"""

import inspect
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from tests.conftest import save_tiny_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

OUT = Path(__file__).with_name("trl_ppo.json")
OF_ROLLOUT = ("scores", "logprobs", "ref_logprobs", "values", "advantages", "returns")
OF_STEP = (
    "new_logprobs",
    "mb_logprobs",
    "mb_advantage",
    "vpred",
    "mb_values",
    "mb_return",
    "pg_loss",
    "vf_loss",
    "loss",
)
PROMPTS, TOKENS = 4, 6


def settings(folder: str) -> dict[str, Any]:
    """Of TRL's PPOConfig; those that the comparison needs go into the file."""
    return {
        "output_dir": folder,
        "learning_rate": 0.02,
        "per_device_train_batch_size": PROMPTS,
        "gradient_accumulation_steps": 1,
        "num_mini_batches": 2,
        "num_ppo_epochs": 2,
        "total_episodes": PROMPTS,
        "response_length": TOKENS,
        "num_sample_generations": 0,
        "kl_coef": 0.3,
        "cliprange": 0.1,
        "cliprange_value": 0.05,
        "vf_coef": 0.25,
        "gamma": 0.9,
        "lam": 0.8,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "seed": 3,
    }


def main() -> None:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    assert trl.__version__ == "1.12.0", trl.__version__
    with tempfile.TemporaryDirectory() as folder:
        model = str(save_tiny_model(Path(folder) / "model"))
        tokenizer = AutoTokenizer.from_pretrained(model)
        chosen = settings(folder)
        ids = [tokenizer(text)["input_ids"] for text in ("red", "blue lamp", "salt", "a green kettle")]
        trainer: Any = PPOTrainer(
            args=PPOConfig(**chosen),
            processing_class=tokenizer,
            model=_random(AutoModelForCausalLM, model, 1),
            ref_model=_random(AutoModelForCausalLM, model, 2),
            reward_model=_random(AutoModelForSequenceClassification, model, 4, num_labels=1),
            value_model=_random(AutoModelForSequenceClassification, model, 5, num_labels=1),
            train_dataset=Dataset.from_list([{"input_ids": one} for one in ids]),
        )
        noted = _note(trainer)
        trainer.train()
    wanted = ("kl_coef", "kl_estimator", "cliprange", "cliprange_value", "vf_coef", "gamma", "lam")
    told = {name: getattr(trainer.args, name) for name in wanted}
    OUT.write_text(json.dumps({"settings": told, **noted}, indent=1) + "\n")


def _random(kind: Any, model: str, seed: int, **options: Any) -> Any:
    """A model of the config of another, with weights of its own that are large enough to disagree."""
    torch.manual_seed(seed)
    made = kind.from_pretrained(model, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    made.config.pad_token_id = made.config.eos_token_id
    return made


def _note(trainer: Any) -> dict[str, Any]:
    """What its loop holds whenever it computes backwards: of the rollout once, of each step in turn."""
    noted: dict[str, Any] = {"rollout": {}, "steps": []}
    backward = trainer.accelerator.backward

    def noting(loss: torch.Tensor) -> None:
        frame = inspect.currentframe()
        assert frame is not None
        assert frame.f_back is not None
        held = frame.f_back.f_locals
        noted["rollout"] = noted["rollout"] or {name: held[name].tolist() for name in OF_ROLLOUT}
        gradients = torch.autograd.grad(loss, [held["new_logprobs"], held["vpred"]], retain_graph=True)
        step = {name: held[name].tolist() for name in OF_STEP}
        names = ("gradient of new_logprobs", "gradient of vpred")
        noted["steps"].append(step | {name: one.tolist() for name, one in zip(names, gradients, strict=True)})
        assert not held["padding_mask"].any(), "an answer ended early"
        backward(loss)

    trainer.accelerator.backward = noting
    return noted


if __name__ == "__main__":
    main()
