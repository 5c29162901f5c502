"""What the makers of suites share: drawing distinct items, and putting right answers among wrong ones.

Never reads a model, a tokenizer or the network.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Item = dict[str, object]
Drawn = TypeVar("Drawn", bound=tuple[Any, ...])


def distinct(name: str, count: int, make: Callable[[random.Random, int], Drawn]) -> list[Drawn]:
    """Return `count` draws of `make` whose first parts differ; it is told how many there are (to take variants by turns).

    Each name has a generator of its own, so a paradigm that is added or changed leaves the others as they were.
    """
    rng, found = random.Random(f"luthier {name}"), dict[object, Drawn]()
    for _ in range(100 * count):
        drawn = make(rng, len(found))
        found.setdefault(drawn[0], drawn)
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"{name}: only {len(found)} different items of {count}; its lexicon is too small")


def placed(name: str, questions: Sequence[tuple[Item, str, Sequence[str]]]) -> list[Item]:
    """Return each question with its options: the right answer and up to three of the wrong ones.

    The right one stands in each place equally often, so that always choosing the same place is worth nothing.
    """
    rng = random.Random(f"luthier places {name}")
    places = [number % 4 for number in range(len(questions))]
    rng.shuffle(places)
    items = []
    for (item, answer, wrong), place in zip(questions, places, strict=True):
        options = rng.sample(sorted(wrong), min(3, len(wrong)))
        place %= len(options) + 1
        items.append({**item, "options": [*options[:place], answer, *options[place:]], "answer": place})
    return items
