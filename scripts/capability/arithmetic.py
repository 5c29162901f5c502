"""Sums with one right answer and wrong ones that lie near it: slips that a careless reckoner would make."""

import random
from collections.abc import Callable

from capability.drawing import Item, distinct, placed

QUESTIONS_OF_EACH = 40

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "Jack")
GOODS = ("apples", "pencils", "stamps", "marbles", "cookies", "books", "shells", "coins", "buttons", "eggs")

Sum = tuple[str, int, tuple[int, ...]]  # question, right answer, slips


def addition(rng: random.Random, turn: int) -> Sum:
    """Add two numbers, one or two digits each by turns."""
    highest = (9, 50)[turn % 2]
    left, right = rng.randint(2, highest), rng.randint(2, highest)
    return f"{left} + {right} =", left + right, near(left + right)


def subtraction(rng: random.Random, turn: int) -> Sum:
    """Take one number from a larger one."""
    highest = (18, 60)[turn % 2]
    left = rng.randint(8, highest)
    right = rng.randint(2, left - 2)
    return f"{left} - {right} =", left - right, (left + right, *near(left - right))


def product(rng: random.Random, turn: int) -> Sum:
    """Multiply within the table of ten."""
    left, right = rng.randint(2, 10), rng.randint(2, 10)
    return f"{left} * {right} =", left * right, (left * (right + 1), left * (right - 1), left + right, *near(left * right))


def sequence(rng: random.Random, turn: int) -> Sum:
    """Continue a row of numbers with equal steps."""
    step, start = rng.randint(2, 10), rng.randint(1, 20)
    row = [start + step * place for place in range(4)]
    following = row[-1] + step
    return ", ".join(map(str, row)) + ",", following, (following + step, *near(following))


def word_problem(rng: random.Random, turn: int) -> Sum:
    """Tell a sum as a story of one step."""
    (one, other), goods = rng.sample(NAMES, 2), rng.choice(GOODS)
    left, right = rng.randint(12, 20), rng.randint(2, 4)
    story, answer = (
        (f"{one} has {left} {goods} and gets {right} more. How many {goods} does {one} have now?", left + right),
        (f"{one} had {left} {goods} and gave {right} of them to {other}. How many {goods} does {one} have left?", left - right),
        (f"{one} has {right} boxes with {left} {goods} in each. How many {goods} are there in all?", left * right),
        (f"{one} has {left} {goods}. {other} has {right} more than {one}. How many {goods} does {other} have?", left + right),
    )[turn % 4]
    return f"{story} Answer:", answer, (left + right, left - right, left * right, *near(answer))


def larger(rng: random.Random, turn: int) -> Sum:
    """Say which of two numbers is larger; it is named first and second by turns."""
    low, high = sorted(rng.sample(range(10, 100), 2))
    pair = (high, low) if turn % 2 else (low, high)
    return f"Which number is larger, {pair[0]} or {pair[1]}? The larger number is", high, (low,)


SUMS: tuple[Callable[[random.Random, int], Sum], ...] = (addition, subtraction, product, sequence, word_problem, larger)


def arithmetic() -> list[Item]:
    """Return the questions of all kinds, each with its right answer among at most four options."""
    return placed(
        "arithmetic",
        [
            (
                {"id": f"{make.__name__}-{number:02}", "kind": make.__name__, "question": question},
                str(answer),
                wrong_of(answer, slips),
            )
            for make in SUMS
            for number, (question, answer, slips) in enumerate(distinct(make.__name__, QUESTIONS_OF_EACH, make), start=1)
        ],
    )


def wrong_of(answer: int, slips: tuple[int, ...]) -> list[str]:
    """Return the first three slips that have as many digits as the answer: many models read digits one by one, and then the
    shorter number is the likelier one whatever was asked."""
    fitting = [slip for slip in dict.fromkeys(slips) if slip != answer and slip >= 0 and len(str(slip)) == len(str(answer))]
    return [str(slip) for slip in fitting[:3]]


def near(answer: int) -> tuple[int, ...]:
    """Return slips by a little and by ten."""
    return (answer + 10, answer - 1, answer + 1, answer - 10, answer + 2, answer - 2, answer + 3, answer - 3)
