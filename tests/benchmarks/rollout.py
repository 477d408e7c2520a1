"""Rollouts of ftlaunch against a loop of transformers' `generate` over single prompts: same model, prompts, threads.

    python tests/benchmarks/rollout.py --model .cache/SmolLM2-135M-Instruct --data ../shared/data

Both answer GSM8K questions almost greedily, so that they should say the same: the share of equal tokens is printed.
The last line is the ratio of generated tokens a second, ours over theirs.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import duel
import numpy as np
import torch
from accelerate import PartialState

from ftlaunch.recipe.stages import Ppo
from fttrain.distributed.world import World
from fttrain.engine import Engine
from fttrain.model.scorer import DTYPES, load_base, load_tokenizer
from fttrain.ppo.actor import ActorCritic
from fttrain.ppo.rollout import Sampling, roll_out

ALMOST_GREEDY = 0.01


def ours(model: str, dtype: str, prompts: list[np.ndarray], stop: int, longest: int) -> tuple[list[list[int]], float]:
    """Answers, and the seconds that they took."""
    step = duel.bench_step(Ppo(data="prompts", reward_function="gsm8k"), model, dtype=dtype)
    PartialState(cpu=True)
    engine = Engine(step, World(0, 1, 0, 1, torch.device("cpu"), ()))
    actor = ActorCritic(load_base(step.model, dtype=DTYPES[dtype], packing=True), temperature=ALMOST_GREEDY)
    engine.prepare(actor, torch.optim.SGD(actor.parameters()))
    sampling = Sampling(max_new_tokens=longest, batch_size=32, stop_ids=frozenset({stop}), seed=(0,))
    began = time.perf_counter()
    answers = roll_out(engine, actor, prompts, sampling)
    return [answer.ids_T.tolist() for answer in answers], time.perf_counter() - began


@torch.no_grad()
def theirs(model: str, dtype: str, prompts: list[np.ndarray], stop: int, longest: int) -> tuple[list[list[int]], float]:
    from transformers import AutoModelForCausalLM

    plain: Any = AutoModelForCausalLM.from_pretrained(model, dtype=DTYPES[dtype])
    answers = []
    began = time.perf_counter()
    for prompt in prompts:
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        said = plain.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=longest,
            do_sample=False,
            eos_token_id=stop,
            pad_token_id=stop,
        )
        answers.append(said[0, ids.shape[1] :].tolist())
    return answers, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    duel.add_dtype(parser)
    options = parser.parse_args()
    dtype = duel.dtype_of(options)
    tokenizer = load_tokenizer(options.model)
    with (options.data / "gsm8k_train.jsonl").open() as file:
        questions = [json.loads(line)["question"] for line in file][: options.prompts]
    turns = [[{"role": "user", "content": question}] for question in questions]
    texts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    prompts = [np.array(tokenizer(text, add_special_tokens=False).input_ids, dtype=np.int32) for text in texts]
    found = {}
    for name, generate in {"ftlaunch": ours, "generate, one by one": theirs}.items():
        answers, seconds = generate(options.model, dtype, prompts, tokenizer.eos_token_id, options.max_new_tokens)
        found[name] = (answers, sum(map(len, answers)) / seconds)
        print(f"{name}: {found[name][1]:.1f} tokens/s, {sum(map(len, answers))} tokens of {len(answers)} answers")
    (mine, speed), (other, speed_2) = found.values()
    same = [a == b for x, y in zip(mine, other, strict=True) for a, b in zip(x, y, strict=False)]
    print(f"equal tokens: {sum(same) / len(same):.1%}")
    print(f"ratio {speed / speed_2:.2f}")


if __name__ == "__main__":
    main()
