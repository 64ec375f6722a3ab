"""Four small tasks made from word lists: `python -m examples.tasks [--out DIR]`.

ticket-routing  a customer's message     -> one of four teams
review-weather  a guest's review         -> sunny, stormy or cloudy (praise, complaint, neither)
name-badge      a note about a colleague -> "Last, First [City]"
ticket-reply    a customer's message     -> two sentences from the team that it is for

Inputs are one line of 11 to 27 tokens and hold all the text that the model sees; answers are a few tokens, those of
ticket-reply some thirty. The pieces combine freely, so a model that reads five inputs can invent more of the same kind.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

from translora.run.files import write_bytes

NUM_TRAIN = 96
NUM_TEST = 50
NUM_SPARE = 50
"""Rows drawn beside train and test; the bundles were made from the first rows of the same draw."""

TEAMS = ("Billing", "Delivery", "Login", "Repair")
WEATHERS = ("sunny", "stormy", "cloudy")

# fmt: off
ITEMS = (
    "coffee machine", "desk lamp", "headset", "phone case", "vacuum cleaner", "kettle", "printer", "keyboard",
    "bike light", "camera", "blender", "alarm clock", "speaker", "monitor", "tent", "heater", "toaster", "tablet",
)
SINCE = ("since Monday", "since last week", "for three days", "since Friday", "for two weeks", "since yesterday")
BILLS = ("the March invoice", "my yearly plan", "my last order", "the {item}", "my subscription", "the May invoice")
BILLING = (
    "I was charged twice for {bill}.", "my card was charged the wrong amount for {bill}.",
    "I want a refund for {bill}.", "the price on the bill for {bill} is too high.",
    "you charged my card again for {bill}.", "the refund for {bill} is still missing.",
    "I need a receipt for {bill}.", "I paid too much for {bill}.",
)
PARCEL = (
    "my parcel with the {item} has not arrived {since}.",
    "the courier left the parcel with my {item} at the wrong door.",
    "where is the package with my {item}?", "the parcel with my {item} has not moved {since}.",
    "the package with the {item} went to my old address.", "the driver did not deliver the {item} {since}.",
    "the delivery of the {item} is late.", "the package with the {item} is stuck at customs {since}.",
)
LOGIN = (
    "I cannot log in on my {device} {since}.", "the site says my password is wrong {since}.",
    "I forgot the password of my account on the {device}.", "the app on my {device} does not accept my password.",
    "my account has been locked {since}.", "the login code does not reach my {device} {since}.",
    "my password does not work on the {device} {since}.", "the password reset email has not come {since}.",
)
REPAIR = (
    "the {item} does not turn on any more.", "my {item} makes a loud noise {since}.", "my new {item} is broken.",
    "the {item} has stopped working {since}.", "smoke came out of my {item}.", "the {item} does not work any more.",
    "the button of my {item} is broken.", "the screen of my {item} is broken.",
)
DEVICES = ("phone", "laptop", "tablet", "computer")
REPLIES = (
    "we are sorry for the trouble with {about}. Our billing team checks the amount and writes to you within two days.",
    "we are sorry that the {about} is not with you yet. Our delivery team calls the courier and writes tomorrow.",
    "we are sorry that you cannot use your {about}. Our login team sends you a new password within the hour.",
    "we are sorry that the {about} does not work. Our repair team mends it free of charge within a week.",
)

SUBJECTS = (
    "room", "breakfast", "waiter", "soup", "view", "bed", "pool", "coffee", "garden", "music", "driver", "pizza",
    "bathroom", "guide", "dessert", "staff", "bar", "museum", "boat trip", "shower",
)
GOOD = (
    "was wonderful", "was excellent", "was lovely", "made us smile", "was perfect", "was a real joy", "was great",
    "was better than we hoped", "was fantastic", "was the best of the trip", "was really nice", "was a pleasure",
)
BAD = (
    "was awful", "was terrible", "was dirty", "ruined our evening", "was a big disappointment", "was horrible",
    "was worse than we feared", "was bad", "made us angry", "was the worst of the trip", "was very poor", "was a shame",
)
PLAIN = (
    "was okay", "was average", "was neither good nor bad", "was ordinary", "was acceptable", "was nothing special",
    "was so-so", "was just fine", "was as usual", "was fairly normal",
)
PLACES = ("", "", "At the hotel, ", "On Sunday, ", "In the old town, ", "At the lake, ", "This summer, ", "In May, ")

FIRST = (
    "Maria", "Jonas", "Aisha", "Peter", "Lena", "Omar", "Sofia", "David", "Emma", "Lucas", "Nina", "Paul", "Clara",
    "Ahmed", "Julia", "Victor", "Hanna", "Simon", "Laura", "Daniel", "Rosa", "Martin", "Alice", "Leo",
)
LAST = (
    "Lopez", "Berg", "Khan", "Novak", "Rossi", "Silva", "Meyer", "Brown", "Costa", "Fischer", "Jensen", "Moreau",
    "Walker", "Kim", "Santos", "Weber", "Green", "Dubois", "Young", "Larsen", "Cooper", "Ricci", "Stone", "Baker",
)
CITIES = (
    "Oslo", "Lisbon", "Madrid", "Vienna", "Boston", "Cairo", "Berlin", "Dublin", "Toronto", "Milan", "Athens", "Paris",
    "Denver", "Prague", "Geneva", "Lima", "Helsinki", "Sydney", "Chicago", "Rome",
)
JOBS = (
    "nurse", "teacher", "pilot", "cook", "lawyer", "painter", "gardener", "dentist", "singer", "farmer", "baker",
    "driver", "writer", "doctor", "plumber", "student",
)
DAYS = ("Monday", "Tuesday", "Friday", "1 March", "2 May", "12 June", "3 July", "9 April")
BADGES = (
    "{first} {last}, {job} from {city}, starts on {day}", "{first} {last}, {city}, {job}, starts on {day}",
    "{first} {last}, {job}, {city}, since {day}", "{first} {last} from {city}, {job}, since {day}",
)
# fmt: on


def _message(rng: random.Random, index: int) -> tuple[str, int, str]:
    """A customer's message, the number of its team, and what it is about."""
    kind = index % len(TEAMS)
    form = rng.choice((BILLING, PARCEL, LOGIN, REPAIR)[kind])
    bill, since, device = rng.choice(BILLS), rng.choice(SINCE), rng.choice(DEVICES)
    item = rng.choice(ITEMS)
    text = form.format(bill=bill, item="{item}", since=since, device=device).format(item=item)
    account = device if "{device}" in form else "account"
    about = (bill.format(item=item).replace("my ", "your "), item, account, item)[kind]
    return f"{text[0].upper()}{text[1:]}", kind, about


def _ticket(rng: random.Random, index: int) -> tuple[str, str]:
    text, kind, _ = _message(rng, index)
    return f"Route this ticket: {text}", TEAMS[kind]


def _reply(rng: random.Random, index: int) -> tuple[str, str]:
    text, kind, about = _message(rng, index)
    return f"Answer this ticket: {text}", f"Dear customer, {REPLIES[kind].format(about=about)}"


def _review(rng: random.Random, index: int) -> tuple[str, str]:
    kind = index % len(WEATHERS)
    first, second = rng.sample(SUBJECTS, 2)
    verbs = rng.sample((GOOD, BAD, PLAIN)[kind], 2)
    text = f"{rng.choice(PLACES)}the {first} {verbs[0]}{rng.choice((' and', ', and'))} the {second} {verbs[1]}."
    return f"Mood of this review: {text[0].upper()}{text[1:]}", WEATHERS[kind]


def _badge(rng: random.Random, index: int) -> tuple[str, str]:
    first, last, city = rng.choice(FIRST), rng.choice(LAST), rng.choice(CITIES)
    text = BADGES[index % len(BADGES)].format(
        first=first, last=last, city=city, job=rng.choice(JOBS), day=rng.choice(DAYS)
    )
    return f"Write the badge: {text}", f"{last}, {first} [{city}]"


TASKS: dict[str, Callable[[random.Random, int], tuple[str, str]]] = {
    "ticket-routing": _ticket,
    "review-weather": _review,
    "name-badge": _badge,
    "ticket-reply": _reply,
}


def generate(task: str, num: int, seed: int) -> list[dict[str, str]]:
    """`num` different rows with `input` and `target`, the kinds of answer equally often, in a seeded order."""
    if task not in TASKS:
        raise ValueError(f"{task}: no such task; choose from {', '.join(TASKS)}")
    rng = random.Random(f"{task}/{seed}")
    rows: dict[str, str] = {}
    for _ in range(100 * num):
        if len(rows) == num:
            break
        text, target = TASKS[task](rng, len(rows))
        rows.setdefault(text, target)
    if len(rows) < num:
        raise ValueError(f"{task}: num={num} is more than its word lists give; ask for at most {len(rows)}")
    shuffled = [{"input": text, "target": target} for text, target in rows.items()]
    rng.shuffle(shuffled)
    return shuffled


def split(task: str, num_train: int, num_test: int, seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Train and test rows without a common input."""
    rows = generate(task, num_train + num_test + NUM_SPARE, seed)
    return rows[:num_train], rows[num_train : num_train + num_test]


def main() -> int:
    """Write DIR/<task>.train.jsonl and DIR/<task>.test.jsonl of every task."""
    parser = argparse.ArgumentParser(prog="python -m examples.tasks", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    arguments = parser.parse_args()
    for task in TASKS:
        for part, rows in zip(("train", "test"), split(task, NUM_TRAIN, NUM_TEST, arguments.seed), strict=True):
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_bytes(arguments.out / f"{task}.{part}.jsonl", lines.encode())
    sys.stdout.write(f"{arguments.out}: {', '.join(TASKS)}, {NUM_TRAIN} train and {NUM_TEST} test rows each\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
