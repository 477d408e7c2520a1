"""Writes pairs.jsonl: 320 made-up restaurants, each told twice: in the house style, and as an advertisement boasts.

The facts and the house style are make_restaurants.py's. `python make_pairs.py [FILE]` gives the same file every time.
"""

import json
import random
import sys
from pathlib import Path

from make_restaurants import AREA, Facts, draw, meaning, tell

ROWS = 320
SEED = 21


def boast(facts: Facts, rng: random.Random) -> str:
    """The same facts as no guide should tell them, with praise that nothing bears out."""
    name = facts["name"]
    opening = [f"Welcome to {name}!", f"{name} is simply amazing!", f"Have you heard of {name}? You must come!"]
    sentences = [rng.choice(opening)]
    if "food" in facts:
        sentences.append(f"Our {facts['food']} dishes are {rng.choice(['a dream', 'out of this world', 'a miracle'])}!")
    if "area" in facts:
        sentences.append(f"Find us {AREA[facts['area']]}, {rng.choice(['a magical spot', 'the best place on earth'])}!")
    if "price" in facts:
        sentences.append(rng.choice(["What a bargain!", "Every penny is worth it!"]))
    sentences.append(rng.choice(["Everybody loves us!", "You will never forget it!", "Do not miss out!"]))
    return " ".join(sentences)


def rows() -> list[Facts]:
    """ROWS rows of `mr`, `chosen` and `rejected`, no two with the same facts."""
    rng = random.Random(SEED)
    made: dict[str, Facts] = {}
    while len(made) < ROWS:
        facts = draw(rng)
        mr = meaning(facts)
        made.setdefault(mr, {"mr": mr, "chosen": tell(facts, rng), "rejected": boast(facts, rng)})
    return list(made.values())


def main() -> None:
    """Write the pairs to the file that the command line names, or next to this script."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("pairs.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")


if __name__ == "__main__":
    main()
