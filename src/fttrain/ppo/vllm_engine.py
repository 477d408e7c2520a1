"""The process in which vLLM samples for one rank: `python -m fttrain.ppo.vllm_engine RANK_PID`.

The first line of JSON on stdin has the arguments of vLLM's `LLM`; each further line has prompts and an adapter, and a
line on stdout has the answers. vLLM's own output goes to stderr.
"""

import json
import os
import sys
from typing import Any

from fttrain.distributed import sidecar


def main() -> None:
    """Load the model that the first line of stdin describes, and answer each further line with one on stdout."""
    if not sidecar.keep_to(int(sys.argv[1])):
        return
    # vLLM prints to stdout; so answers get a copy of that descriptor, and stdout itself is sent to stderr.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    from vllm import LLM  # pyright: ignore[reportMissingImports] the user installs it

    engine = LLM(**json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        print(json.dumps(answer(engine, json.loads(line))), file=answers, flush=True)


def answer(engine: Any, order: dict[str, Any]) -> list[tuple[list[int], list[float], bool]]:
    """Return, for each prompt's answer, its tokens, the log-probability of each as drawn, and whether it has ended."""
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

    ways = [SamplingParams(seed=seed, logprobs=0, detokenize=False, **order["sampling"]) for seed in order["seeds"]]
    policy = LoRARequest("policy", order["number"], order["adapter"])
    prompts = [{"prompt_token_ids": ids} for ids in order["prompts"]]
    done = engine.generate(prompts, ways, lora_request=policy, use_tqdm=False)
    return [_as_plain(one.outputs[0]) for one in done]


def _as_plain(output: Any) -> tuple[list[int], list[float], bool]:
    ids = list(output.token_ids)
    logps = [at[token].logprob for token, at in zip(ids, output.logprobs, strict=True)]
    return ids, logps, output.finish_reason == "stop"


if __name__ == "__main__":
    main()
