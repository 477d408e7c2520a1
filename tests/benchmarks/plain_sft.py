"""What a careful person writes by hand with accelerate, transformers, peft and datasets: the opponent of startup.py.

    accelerate launch plain_sft.py MODEL ROWS.jsonl bf16|fp32

Prints "FIRST STEP" once the first optimizer step is done, and leaves.
"""

import sys

import torch
from accelerate import Accelerator
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    model_path, rows, dtype = sys.argv[1:]
    accelerator = Accelerator(cpu=True)
    tokenizer = AutoTokenizer.from_pretrained(model_path)

    def encode(row):
        turn = [{"role": "user", "content": row["mr"]}]
        prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        tail = tokenizer(row["text"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        return {"input_ids": head + tail, "labels": [-100] * len(head) + tail}

    def collate(rows):
        width = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": tokenizer.pad_token_id, "labels": -100}
        return {
            key: torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])
            for key, value in fill.items()
        }

    table = load_dataset("json", data_files=rows, split="train").map(encode, remove_columns=["mr", "text"])
    weights = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=weights)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    loader = DataLoader(table, batch_size=8, shuffle=True, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        print("FIRST STEP", float(loss), flush=True)
        return


if __name__ == "__main__":
    main()
