"""Requests whose answer can be checked by its form alone: no model and no person has to judge it."""

import random
from collections.abc import Callable

from capability.drawing import Item, distinct

REQUESTS_OF_EACH = 20

WORDS = (
    "river", "stone", "cloud", "garden", "lamp", "bread", "winter", "mirror", "forest", "silver",
    "candle", "bridge", "honey", "paper", "yellow", "button", "island", "pocket", "window", "copper",
)  # fmt: skip
SUBJECTS = (
    "fruits", "colors", "animals", "vegetables", "countries", "tools", "sports", "musical instruments", "drinks", "trees",
    "pieces of furniture", "birds", "flowers", "cities", "kinds of weather",
)  # fmt: skip
RECORDS = {
    "name": ("Anna", "Peter", "Maria", "Tom", "Lucy", "Omar"),
    "age": ("31", "45", "27", "62", "19"),
    "city": ("Paris", "Rome", "Madrid", "Vienna", "Oslo"),
    "job": ("baker", "nurse", "teacher", "farmer", "painter"),
    "color": ("red", "blue", "green", "black"),
    "price": ("12", "40", "75", "8"),
}
YES_OR_NO = (
    "Is ice colder than boiling water?",
    "Is the sun a star?",
    "Can a stone swim?",
    "Is seven more than ten?",
    "Do cows give milk?",
    "Is a mouse bigger than a horse?",
    "Does a week have seven days?",
    "Is snow black?",
    "Do birds have feathers?",
    "Is fire cold?",
    "Is Paris in France?",
    "Do fish live on the moon?",
    "Is a triangle a shape?",
    "Does a car have a hundred wheels?",
    "Is sugar sweet?",
    "Do trees walk at night?",
    "Is the ocean salty?",
    "Is a month longer than a year?",
    "Can most birds fly?",
    "Is a feather heavier than a truck?",
)

Request = tuple[str, dict[str, object]]  # what is asked, and a check of `luthier.evaluate.checks`


def only(pattern: str) -> dict[str, object]:
    """Return the check that an answer is this and nothing else; a full stop at its end is forgiven."""
    return {"check": "matches", "pattern": rf"^{pattern}\.?$"}


def json_object(rng: random.Random, turn: int) -> Request:
    """Ask for two or three facts as a JSON object."""
    keys = rng.sample(sorted(RECORDS), 2 + turn % 2)
    facts = ", ".join(f"{key} {rng.choice(RECORDS[key])}" for key in keys)
    asked = f"Write this as a JSON object with the keys {', '.join(keys)}: {facts}. Reply with the JSON only."
    return asked, {"check": "json", "keys": keys}


def list_of(rng: random.Random, turn: int) -> Request:
    """Ask for a list with a given number of lines."""
    count, subject = rng.randint(3, 6), SUBJECTS[turn % len(SUBJECTS)]
    asked = f"Name {count} {subject}. Put each on a line of its own and write nothing else."
    return asked, {"check": "lines", "exactly": count}


def upper_case(rng: random.Random, turn: int) -> Request:
    """Ask for some words in capitals."""
    words = " ".join(rng.sample(WORDS, 3))
    return f"Write these words in upper case: {words}", only(words.upper())


def copy(rng: random.Random, turn: int) -> Request:
    """Ask for some words as they are."""
    words = " ".join(rng.sample(WORDS, 4))
    return f"Repeat exactly these words and nothing else: {words}", only(words)


def reverse(rng: random.Random, turn: int) -> Request:
    """Ask for two words in the other order."""
    one, two = rng.sample(WORDS, 2)
    asked = f"Swap the two words. Example: red blue -> blue red. Now you: {one} {two} ->"
    return asked, only(f"{two} {one}")


def commas(rng: random.Random, turn: int) -> Request:
    """Ask for some words with commas between them."""
    words = rng.sample(WORDS, 3)
    asked = f"Put a comma after each word but the last, on one line: {' '.join(words)}"
    return asked, only(", ".join(words))


def one_word(rng: random.Random, turn: int) -> Request:
    """Ask for an answer of exactly one word."""
    kind, place = rng.choice(SUBJECTS[:4]), ("cold", "hot", "small", "big", "rich")[turn % 5]
    return f"Think of {kind} in a {place} country. Answer with exactly one word: name one.", {"check": "words", "exactly": 1}


def yes_or_no(rng: random.Random, turn: int) -> Request:
    """Ask for yes or no and nothing more; whether it is true does not count, that is what the facts are for."""
    return f"{YES_OR_NO[turn % len(YES_OR_NO)]} Answer only yes or no.", only("(?i:yes|no)")


REQUESTS: tuple[Callable[[random.Random, int], Request], ...] = (
    json_object,
    list_of,
    upper_case,
    copy,
    reverse,
    commas,
    one_word,
    yes_or_no,
)


def formats() -> list[Item]:
    """Return the requests of all kinds, each with the check of its answer."""
    return [
        {"id": f"{make.__name__}-{number:02}", "kind": make.__name__, "prompt": prompt, "checks": [check]}
        for make in REQUESTS
        for number, (prompt, check) in enumerate(distinct(make.__name__, REQUESTS_OF_EACH, make), start=1)
    ]
