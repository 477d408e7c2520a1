"""Writes restaurants.jsonl: 600 made-up restaurants, each as facts and as sentences in one house style.

The style is there to be learned and seen: the name comes first, the facts follow in one order, and the last words
depend on the rating. `python make_restaurants.py [FILE]` gives the same file every time.
"""

import json
import random
import sys
from pathlib import Path

ROWS = 600
SEED = 20
FIRST = ["Amber", "Blue", "Copper", "Crooked", "Golden", "Hidden", "Little", "Old", "Quiet", "Salt", "Silver", "Winter"]
SECOND = ["Anchor", "Barrel", "Heron", "Kettle", "Lantern", "Mill", "Orchard", "Pepper", "Spoon", "Swan", "Wharf"]
FOOD = ["Basque", "Cantonese", "Ethiopian", "Georgian", "Greek", "Korean", "Lebanese", "Nordic", "Peruvian", "Sicilian"]
AREA = {
    "harbour": "at the harbour",
    "market quarter": "in the market quarter",
    "old town": "in the old town",
    "riverside": "on the riverside",
    "station quarter": "in the station quarter",
    "university district": "in the university district",
}
"""With the words that say where that is."""
PRICE = ["low", "moderate", "high"]
RATING = ["3 out of 10", "5 out of 10", "6 out of 10", "8 out of 10", "9 out of 10"]
NEAR = ["Poplar Park", "St Brannoc's Church", "Tanner's Bridge", "the Glass Library", "the Opera", "the Tram Museum"]
KEYS = ["food", "area", "price", "rating", "family friendly", "near"]
"""In the order in which facts are told; `name` goes before them."""

Facts = dict[str, str]


def draw(rng: random.Random) -> Facts:
    """A restaurant with its name and two to six other facts, in the order of KEYS."""
    pools = [FOOD, list(AREA), PRICE, RATING, ["yes", "no"], NEAR]
    chosen = rng.sample(KEYS, rng.randint(2, len(KEYS)))
    facts = {"name": f"The {rng.choice(FIRST)} {rng.choice(SECOND)}"}
    return facts | {key: rng.choice(pool) for key, pool in zip(KEYS, pools, strict=True) if key in chosen}


def meaning(facts: Facts) -> str:
    """The facts as one line: `name[The Salt Heron], food[Greek]`."""
    return ", ".join(f"{key}[{value}]" for key, value in facts.items())


def tell(facts: Facts, rng: random.Random) -> str:
    """The facts as one to four sentences: what and where, then price and rating, then children, then the call."""
    sentences = [opening(facts, rng), verdict(facts, rng), children(facts, rng), call(facts)]
    return " ".join(sentence for sentence in sentences if sentence)


def opening(facts: Facts, rng: random.Random) -> str:
    """Name, food, area and landmark."""
    name, food = facts["name"], facts.get("food")
    area = AREA[facts["area"]] if "area" in facts else ""
    near = f"{rng.choice(['near', 'close to', 'a short walk from'])} {facts['near']}" if "near" in facts else ""
    place = ", ".join(part for part in (area, near) if part)
    if food and place:
        return f"{name} {rng.choice(['serves', 'cooks', 'brings you'])} {food} food {place}."
    if food:
        return f"{name} is {rng.choice(['all about', 'the place for', 'known for'])} {food} food."
    if place:
        return f"{name} {rng.choice(['welcomes you', 'awaits you', 'sets its tables'])} {place}."
    return f"{name} is {rng.choice(['a place of its own', 'worth a word', 'one to note'])}."


def verdict(facts: Facts, rng: random.Random) -> str:
    """Price and rating."""
    price, rating = facts.get("price"), facts.get("rating")
    score = f"guests give it {rating}" if rating else ""
    if price and rating:
        contrast = (price == "high") == (rating[0] in "89")
        return f"Prices are {price}, {'yet' if contrast and price == 'high' else 'and'} {score}."
    if price:
        return rng.choice([f"Prices are {price}.", f"Expect {price} prices.", f"You pay {price} prices."])
    return f"{score[0].upper()}{score[1:]}." if score else ""


def children(facts: Facts, rng: random.Random) -> str:
    """Return a sentence on children, or nothing where the facts do not mention them."""
    if "family friendly" not in facts:
        return ""
    if facts["family friendly"] == "yes":
        return rng.choice(["Children are welcome.", "Bring the children.", "Families feel at home here."])
    return rng.choice(["Leave the children at home.", "It is not a place for children.", "It suits grown-ups only."])


def call(facts: Facts) -> str:
    """The house's last words, which follow from the rating alone."""
    score = facts.get("rating", " ")[0]
    if score in "89":
        return "Book ahead."
    return {"3": "Think twice.", "5": "Keep it in mind.", "6": "Keep it in mind."}.get(score, "Drop by.")


def rows() -> list[Facts]:
    """ROWS rows of `mr` and `text`, no two with the same facts."""
    rng = random.Random(SEED)
    made: dict[str, str] = {}
    while len(made) < ROWS:
        facts = draw(rng)
        made.setdefault(meaning(facts), tell(facts, rng))
    return [{"mr": mr, "text": text} for mr, text in made.items()]


def main() -> None:
    """Write the rows to the file that the command line names, or next to this script."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("restaurants.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")


if __name__ == "__main__":
    main()
