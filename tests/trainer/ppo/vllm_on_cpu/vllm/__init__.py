"""Stands in for vLLM where there is no GPU: the same calls, answered by plain transformers and peft, token by token."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


@dataclass(kw_only=True)
class SamplingParams:
    seed: int
    logprobs: int
    detokenize: bool
    temperature: float
    max_tokens: int
    stop_token_ids: list[int]


class LLM:
    def __init__(self, model, *, dtype, max_model_len, max_lora_rank, logprobs_mode, enable_lora, **others):
        known = {"revision", "skip_tokenizer_init", "generation_config", "gpu_memory_utilization", "max_loras"}
        assert others.keys() == known
        assert enable_lora
        assert logprobs_mode == "processed_logprobs"
        print("vLLM is noisy")
        self.model, self.dtype, self.longest, self.largest = model, getattr(torch, dtype), max_model_len, max_lora_rank

    @torch.no_grad()
    def generate(self, prompts, sampling_params, *, lora_request, use_tqdm):
        assert not use_tqdm
        base = AutoModelForCausalLM.from_pretrained(self.model, dtype=self.dtype)
        policy = PeftModel.from_pretrained(base, Path(lora_request.lora_path)).eval()
        assert policy.peft_config["default"].r <= self.largest
        pairs = zip(prompts, sampling_params, strict=True)
        return [self._answer(policy, prompt["prompt_token_ids"], how) for prompt, how in pairs]

    def _answer(self, policy, prompt, how):
        generator = torch.Generator().manual_seed(how.seed)
        ids, logprobs = [], []
        while len(ids) < how.max_tokens and not (ids and ids[-1] in how.stop_token_ids):
            assert len(prompt) + len(ids) < self.longest
            logps = (policy(torch.tensor([[*prompt, *ids]])).logits[0, -1].float() / how.temperature).log_softmax(-1)
            token = int(torch.multinomial(logps.exp(), 1, generator=generator))
            ids.append(token)
            logprobs.append({token: SimpleNamespace(logprob=float(logps[token]))})
        reason = "stop" if ids[-1] in how.stop_token_ids else "length"
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, logprobs=logprobs, finish_reason=reason)])
