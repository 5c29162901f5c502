"""Sums with one right answer and wrong ones that lie near it: slips that a careless reckoner would make."""

import random
from collections.abc import Callable

from capability.drawing import Item, distinct

QUESTIONS_OF_EACH = 40

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "Jack")
GOODS = ("apples", "pencils", "stamps", "marbles", "cookies", "books", "shells", "coins", "buttons", "eggs")

Sum = tuple[str, int, tuple[int, ...]]  # question, right answer, slips


def addition(rng: random.Random, turn: int) -> Sum:
    """Add two numbers, one or two digits each by turns."""
    highest = (9, 50)[turn % 2]
    left, right = rng.randint(2, highest), rng.randint(2, highest)
    return f"{left} + {right} =", left + right, (left + right + 10, left + right - 1, left + right + 1, left + right - 10)


def subtraction(rng: random.Random, turn: int) -> Sum:
    """Take one number from a larger one."""
    highest = (18, 60)[turn % 2]
    left = rng.randint(8, highest)
    right = rng.randint(2, left - 2)
    return f"{left} - {right} =", left - right, (left - right + 10, left - right - 1, left - right + 1, left + right)


def product(rng: random.Random, turn: int) -> Sum:
    """Multiply within the table of ten."""
    left, right = rng.randint(2, 10), rng.randint(2, 10)
    return f"{left} * {right} =", left * right, (left * (right + 1), left * (right - 1), left + right, left * right + 1)


def sequence(rng: random.Random, turn: int) -> Sum:
    """Continue a row of numbers with equal steps."""
    step, start = rng.randint(2, 10), rng.randint(1, 20)
    row = [start + step * place for place in range(4)]
    following = row[-1] + step
    return ", ".join(map(str, row)) + ",", following, (following + 1, following + step, following - 1, following + 10)


def word_problem(rng: random.Random, turn: int) -> Sum:
    """Tell a sum as a story of one step."""
    (one, other), goods = rng.sample(NAMES, 2), rng.choice(GOODS)
    left, right = rng.randint(6, 20), rng.randint(2, 5)
    story, answer = (
        (f"{one} has {left} {goods} and gets {right} more. How many {goods} does {one} have now?", left + right),
        (f"{one} had {left} {goods} and gave {right} of them to {other}. How many {goods} does {one} have left?", left - right),
        (f"{one} has {right} boxes with {left} {goods} in each. How many {goods} are there in all?", left * right),
        (f"{one} has {left} {goods}. {other} has {right} more than {one}. How many {goods} does {other} have?", left + right),
    )[turn % 4]
    wrong = {left + right, left - right, left * right, answer + 1, left, right} - {answer}
    return f"{story} Answer:", answer, tuple(sorted(wrong))


def larger(rng: random.Random, turn: int) -> Sum:
    """Say which of two numbers is larger; it is named first and second by turns."""
    low, high = sorted(rng.sample(range(10, 100), 2))
    pair = (high, low) if turn % 2 else (low, high)
    return f"Which number is larger, {pair[0]} or {pair[1]}? The larger number is", high, (low,)


SUMS: tuple[Callable[[random.Random, int], Sum], ...] = (addition, subtraction, product, sequence, word_problem, larger)


def arithmetic() -> list[Item]:
    """Return the questions of all kinds, each with its right answer among at most four options."""
    return [
        as_choice(f"{make.__name__}-{number:02}", make.__name__, *drawn)
        for make in SUMS
        for number, drawn in enumerate(distinct(make.__name__, QUESTIONS_OF_EACH, make), start=1)
    ]


def as_choice(name: str, kind: str, question: str, answer: int, slips: tuple[int, ...]) -> Item:
    """Return a question with three of the slips as wrong options, in an order of its own."""
    rng = random.Random(f"luthier {name}")
    wrong = [slip for slip in dict.fromkeys(slips) if slip >= 0 and slip != answer]
    options = [answer, *rng.sample(wrong, min(3, len(wrong)))]
    rng.shuffle(options)
    return {"id": name, "kind": kind, "question": question, "options": list(map(str, options)), "answer": options.index(answer)}
