"""recipes/MODELS.md, made of what the trials of each family said."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "recipes" / "MODELS.md"
COLUMNS = {
    "plan": "plan",
    "exact": "exact",
    "padded": "padded",
    "shared prompts": "shared",
    "SFT": "SFT",
    "full": "full",
    "experts": "experts",
    "nf4": "nf4",
    "DPO": "DPO",
    "reward": "reward",
    "PPO": "PPO",
    "merge": "merge",
    "resume": "resume",
    "2 ranks": "2 ranks",
}
HEADER = """# Models

Made by `make zoo` from tiny random models of each family, in fp32 on a CPU; do not edit. A family that is not here is
tried by the same probe when its stage starts: before the first step, rows as training lays them down are compared with
the model's own forward pass, one by one. What is not the same goes on in a slower layout that is, or ends there.

- **rows**: packed (end to end, prompts of pairs shared), padded, or alone (each computed by itself), as the probe chose
  without the kernels that [README.md](README.md#batches) names, with which more are packed
- **plan**: `ftlaunch plan` foretells that from config.json
- **adapted**: share of the body's weights that LoRA on all linear layers is on; the rest is in experts and routers
- **exact**: in that layout every token's log-probability, and the gradient's norm, are those of plain transformers, row
  by row; **padded**, **shared**: the same of padded rows, and of pairs whose prompt is computed once
- **SFT**: LoRA on all linear layers, with default settings; **full**: all weights; **experts**: `experts = true`,
  merged, resumed, on two ranks and in DPO; **nf4**: the same SFT over weights in 4 bits
- **DPO** begins at ln 2; **PPO** runs; **reward** runs, and is merged into a sequence classifier that has its rewards
- **merge**: with both computed in fp64, no logit of the merged model is further than 1e-5 from the adapter model's, or,
  where that is more, further than computing in fp32 moves logits of the two
- **resume**: stopped after a step, the stage goes on to the very bits of one that was left alone
- **2 ranks**: under ZeRO-3 they have the losses and gradient norms of one

✓ it is so; – there is nothing to try; a number is the reason below. `validate:` before a refusal says that it comes
before anything is created, from config.json and weight files alone; other refusals come at the start of the stage.

"""


def page(families: Sequence[dict[str, Any]]) -> str:
    """Return the page, with the reasons below the table, each once."""
    reasons: dict[str, int] = {}
    names = ["family", "rows", "adapted", *COLUMNS.values()]
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    for one in families:
        said = [one[column] for column in COLUMNS]
        cells = [word if word in "✓–" else str(reasons.setdefault(_general(word), len(reasons) + 1)) for word in said]
        adapted = f"{one['adapted']:.0%}"
        lines.append(f"| {' | '.join([one['family'], one['rows'], adapted, *cells])} |")
    told = "".join(f"{number}. {reason}\n" for reason, number in reasons.items())
    return f"{HEADER}{summary(families)}\n\n" + "\n".join(lines) + (f"\n\n## Why not\n\n{told}" if told else "\n")


def summary(families: Sequence[dict[str, Any]]) -> str:
    """Return how many families each trial is right for, of those that it is about."""
    counts = []
    for column, label in COLUMNS.items():
        about = [one[column] for one in families if one[column] != "–"]
        counts.append(f"{label} {sum(word == '✓' for word in about)} of {len(about)}")
    rows = [one["rows"] for one in families]
    laid = ", ".join(f"{rows.count(layout)} {layout}" for layout in ("packed", "padded", "alone"))
    minutes = sum(one["seconds"] for one in families) / 60
    return f"{len(families)} models ({laid}): {', '.join(counts)}. All of it took {minutes:.0f} minutes of one core."


def _general(reason: str) -> str:
    """Return a reason on one line, without shares and names, so that families share it."""
    told = re.sub(r"\b(on|train) an? \S+ model", r"\1 such a model", " ".join(reason.split()))
    return re.sub(r"\b\d+%", "x %", told)
