"""What alignment teaches the 135M model, on rows that it has not seen: before training, and as it goes on.

    python tests/benchmarks/learning.py --model .cache/SmolLM2-135M-Instruct --data ../shared/data

DPO, ORPO and a reward model on the first 800 GSM8K pairs, of which 120 are held out; PPO with a reward that can be
checked: 1 for an answer of at most 12 words that ends its sentence, else 0. The start is measured by a step that moves
nothing; the margin of DPO is 0 there, so half its pairs are right by chance. There is no opponent, so no ratio.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

PAIRS, HELD_OUT = 800, 120
HEAD = """
name = "learning"
[model]
path = "{model}"
[adapter]
kind = "lora"
rank = 16
alpha = 32
[parallel]
device = "cpu"
"""
PREFERENCE = """
[data.rows]
path = "pairs.jsonl"
format = "preference"
max_length = 512
test = {held_out}
[[stage]]
kind = "{kind}"
data = "rows"
learning_rate = {rate}
steps = {steps}
evaluate_every = 20
warmup = 0.05
batch_size = 8
{more}
"""
PPO = """
[data.rows]
path = "questions.jsonl"
format = "prompt"
prompt = "{{question}}"
test = 64
[[stage]]
kind = "ppo"
data = "rows"
reward_function = "brief.py:brief"
max_new_tokens = 32
rollout_size = 64
batch_size = 32
ppo_epochs = 2
learning_rate = {rate}
kl_coefficient = 0.02
score_scaling = "running"
steps = {steps}
evaluate_every = 20
samples_every = 1
"""
BRIEF = '''
def brief(prompt, answer, row):
    """1 for at most 12 words that end their sentence, else 0."""
    return float(0 < len(answer.split()) <= 12 and answer.endswith((".", "!", "?")))
'''
RATES = {"dpo": 1e-4, "orpo": 2e-3, "reward": 2e-4, "ppo": 1e-4}
STEPS = {"dpo": 40, "orpo": 40, "reward": 40, "ppo": 80}
MORE = {"orpo": "beta = 10.0"}
"""At 0.1, the default, cross-entropy is nearly all that is learnt in so few steps."""
SHOWN = ("loss", "reward", "rewards/accuracy", "rewards/margin")


def write_recipe(kind: str, model: str, data: Path, folder: Path, steps: int) -> Path:
    """The recipe of a stage, with its rows next to it."""
    pairs = (data / "gsm8k_pairs.jsonl").read_text().splitlines()[:PAIRS]
    (folder / "pairs.jsonl").write_text("\n".join(pairs))
    questions = [json.loads(pair)["prompt"].replace("\n", " ").split(". ")[-1] for pair in pairs]
    (folder / "questions.jsonl").write_text("".join(json.dumps({"question": each}) + "\n" for each in questions))
    (folder / "brief.py").write_text(BRIEF)
    text = HEAD + (PPO if kind == "ppo" else PREFERENCE)
    recipe = folder / "recipe.toml"
    asked = {"rate": RATES[kind], "steps": steps, "held_out": HELD_OUT, "more": MORE.get(kind, "")}
    recipe.write_text(text.format(model=model, kind=kind, **asked))
    return recipe


def run(recipe: Path, name: str, *settings: str) -> list[dict[str, float]]:
    """Run the recipe with settings put in; returns what its metrics say."""
    flags = [flag for setting in settings for flag in ("--set", f"stage.0.{setting}")]
    folder = recipe.parent / name
    command = [sys.executable, "-m", "ftlaunch", "run", str(recipe), "--run-dir", str(folder), *flags]
    subprocess.run(command, check=True, capture_output=True)
    return [json.loads(line) for path in folder.glob("01-*/metrics.jsonl") for line in path.read_text().splitlines()]


def tell(kind: str, start: list[dict[str, float]], course: list[dict[str, float]]) -> None:
    """Print the rows held out, before and on the way, and for PPO the KL that it paid."""
    print(f"\n{kind}: {max(int(line['step']) for line in course)} steps")
    evaluated = [line for line in course if any(f"eval/{key}" in line for key in SHOWN)]
    for number, line in [(0, start[-1]), *((int(line["step"]), line) for line in evaluated)]:
        print(f"  step {number:3d}", *(f"{key} {line[f'eval/{key}']:.4f}" for key in SHOWN if f"eval/{key}" in line))
    paid = [line["kl"] for line in course if "kl" in line]
    if paid:
        print(f"  KL from the start, in nats per answer: {paid[-1]:.2f} at the end, {max(paid):.2f} at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--kind", choices=sorted(RATES))
    parser.add_argument("--steps", type=int, help="instead of enough to learn: 40 of pairs, 80 of PPO")
    options = parser.parse_args()
    for kind in [options.kind] if options.kind else RATES:
        steps = options.steps or STEPS[kind]
        with tempfile.TemporaryDirectory(prefix=f"learning-{kind}-") as folder:
            recipe = write_recipe(kind, str(Path(options.model).resolve()), options.data, Path(folder), steps)
            start = run(recipe, "start", "steps=1", "learning_rate=1e-12", "warmup=0")
            tell(kind, start, run(recipe, "whole"))


if __name__ == "__main__":
    main()
