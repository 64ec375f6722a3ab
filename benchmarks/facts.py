"""Questions with answers of one word, for the tag skill of benchmarks.skills."""

from __future__ import annotations

import random

# fmt: off
OPPOSITES = (
    "hot cold", "big small", "up down", "fast slow", "day night", "open closed", "wet dry", "old young", "rich poor",
    "light dark", "happy sad", "full empty", "hard soft", "early late", "high low", "left right", "true false",
    "strong weak", "long short", "clean dirty", "near far", "loud quiet", "good bad", "first last", "black white",
    "inside outside", "buy sell", "win lose", "push pull", "start stop", "north south", "summer winter",
)
CAPITALS = (
    "France Paris", "Italy Rome", "Spain Madrid", "Germany Berlin", "Japan Tokyo", "Egypt Cairo", "Russia Moscow",
    "China Beijing", "Greece Athens", "Austria Vienna", "Portugal Lisbon", "Ireland Dublin", "Norway Oslo",
    "Cuba Havana", "Peru Lima", "Kenya Nairobi", "Poland Warsaw", "Canada Ottawa", "Hungary Budapest",
    "Sweden Stockholm",
)
COLOURS = (
    "grass green", "snow white", "blood red", "coal black", "a banana yellow", "a ripe tomato red", "milk white",
    "the clear sky blue", "a carrot orange", "a lemon yellow", "a leaf green", "the sea blue", "a crow black",
    "an orange orange", "a polar bear white", "a strawberry red", "a cucumber green", "a sunflower yellow",
)
KINDS = (
    "rose flower", "oak tree", "eagle bird", "salmon fish", "apple fruit", "carrot vegetable", "guitar instrument",
    "hammer tool", "chair furniture", "gold metal", "tulip flower", "pine tree", "sparrow bird", "shark fish",
    "pear fruit", "onion vegetable", "piano instrument", "saw tool", "table furniture", "iron metal",
)
TEMPLATES = (
    (OPPOSITES, ("What is the opposite of {}?", "Name the opposite of {}.")),
    (CAPITALS, ("What is the capital of {}?", "Name the capital city of {}.")),
    (COLOURS, ("What colour is {}?", "Name the colour of {}.")),
    (KINDS, ("Is {} a bird, fish, flower, fruit, furniture, instrument, metal, tool, tree or vegetable?",)),
)
# fmt: on


def facts(part: str) -> list[dict[str, str]]:
    """Rows with `input` and `target`; no fact is in both parts, `train` and `test`."""
    rows = []
    for pairs, questions in TEMPLATES:
        for index, pair in enumerate(pairs):
            what, _, answer = pair.rpartition(" ")
            if (index % 3 == 2) == (part == "test"):
                rows += [
                    {"input": f"Answer as a tag: {question.format(what)}", "target": f"<<{answer.capitalize()}>>"}
                    for question in questions
                ]
    random.Random(f"facts/{part}").shuffle(rows)
    return rows
