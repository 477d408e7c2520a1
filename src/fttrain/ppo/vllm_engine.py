"""The process in which vLLM answers for one rank: `python -m fttrain.ppo.vllm_engine RANK_PID`.

The first line of JSON on stdin says what to load (LLM's arguments), each further one what to answer, and with which
adapter; a line on stdout has the answers. What vLLM itself prints goes to stderr.
"""

import json
import os
import sys
from typing import Any

from fttrain.distributed import sidecar


def main() -> None:
    if not sidecar.keep_to(int(sys.argv[1])):
        return
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    from vllm import LLM  # pyright: ignore[reportMissingImports] the user installs it

    engine = LLM(**json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        print(json.dumps(answer(engine, json.loads(line))), file=answers, flush=True)


def answer(engine: Any, order: dict[str, Any]) -> list[tuple[list[int], list[float], bool]]:
    """Of each prompt's answer: its tokens, the log-probability of each as it was drawn, whether it has ended."""
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

    ways = [SamplingParams(seed=seed, logprobs=0, detokenize=False, **order["sampling"]) for seed in order["seeds"]]
    policy = LoRARequest("policy", order["number"], order["adapter"])
    prompts = [{"prompt_token_ids": ids} for ids in order["prompts"]]
    done = engine.generate(prompts, ways, lora_request=policy, use_tqdm=False)
    return [_told(one.outputs[0]) for one in done]


def _told(said: Any) -> tuple[list[int], list[float], bool]:
    ids = list(said.token_ids)
    return ids, [at[token].logprob for token, at in zip(ids, said.logprobs, strict=True)], said.finish_reason == "stop"


if __name__ == "__main__":
    main()
