"""Put suites to a model: the same items to the base and to its adapter, and their scores item by item for whoever judges them.

The base is the same model with its adapters silent. Greedy answers and log-likelihoods only, so that a run can be repeated. Never
decides whether a change is good enough, never prints.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ConfigError
from luthier.evaluate.answers import check_libraries, score_answer
from luthier.evaluate.definitions import ChoiceSuite, GenerateSuite, PairsSuite, RollingSuite
from luthier.evaluate.items import ChoiceItem, GenerateItem, PairItem, RollingItem
from luthier.evaluate.scores import ItemScore, SuiteScores
from luthier.evaluate.suites import Suite

if TYPE_CHECKING:
    from luthier.evaluate.base_cache import BaseScores
    from luthier.evaluate.judgement import Progress
    from luthier.evaluate.served import Served

BATCH_TOKENS = 2048
BATCH_ROWS = 32
KEPT_TOKENS = 8
"""While an answer grows, a token is only keys and values: so many of them count as one that runs through the model."""


@dataclass(frozen=True)
class SuiteRun:
    """One suite for both contestants, item by item. Without an adapter only `base` is filled."""

    suite: Suite
    base: SuiteScores
    adapter: SuiteScores | None
    is_base_cached: bool = False


def run_suites(
    model: Any,
    tokenizer: Any,
    suites: Sequence[Suite],
    *,
    batch_tokens: int = BATCH_TOKENS,
    known: "BaseScores | None" = None,
    served: "Served | None" = None,
    on_progress: "Progress | None" = None,
) -> list[SuiteRun]:
    """Put every suite to the base and to the adapter that is active now, if there is one.

    What `known` holds of this base is not run again; what it does not hold is put there. With `served` an engine answers in the
    model's place.
    Raises: ConfigError if two suites share a name; what `run_suite` raises.
    """
    from luthier.adapt import disabled
    from luthier.evaluate.judgement import active_adapters

    names = [suite.name for suite in suites]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two suites are called {', '.join(map(repr, twice))}; give them names of their own")
    has_adapter = bool(active_adapters(model))
    results = []
    for suite in suites:
        run = partial(run_suite, model, tokenizer, suite, batch_tokens=batch_tokens, served=served)
        base = None if known is None else known.find(suite, batch_tokens)
        is_cached = base is not None
        if base is None:
            with disabled(model) if has_adapter else nullcontext():
                base = run(on_progress=_named(on_progress, f"{suite.name}: base"))
            if known is not None:
                known.keep(suite, batch_tokens, base)
        adapter = run(on_progress=_named(on_progress, f"{suite.name}: adapter")) if has_adapter else None
        results.append(SuiteRun(suite, base, adapter, is_cached))
    return results


def run_suite(
    model: Any,
    tokenizer: Any,
    suite: Suite,
    *,
    batch_tokens: int = BATCH_TOKENS,
    served: "Served | None" = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> SuiteScores:
    """Put one suite to the model as it is now, and return the scores of its items in their order.

    `batch_tokens` bounds memory: the tokens of a forward pass, padding included. In bfloat16 it can decide between two nearly
    equal options, so contestants must have the same.
    Raises: DataError for items the model cannot read; MissingExtraError; TrainingError for numbers that are not finite.
    """
    asked = suite.definition
    ask = partial(_ASK[asked.type], served=served) if asked.type == "generate" else _ASK[asked.type]
    values = ask(asked, suite.items, model, tokenizer, batch_tokens, on_progress)
    items = tuple(
        ItemScore(item.id, score, item.cluster, item.slices, output)
        for item, (score, output) in zip(suite.items, values, strict=True)
    )
    return SuiteScores(suite.name, suite.digest, asked.kind, asked.metric, asked.scale, items)


Scored = tuple[float, str | None]
Report = Callable[[int, int], None] | None


def _choices(
    asked: ChoiceSuite, items: Sequence[ChoiceItem], model: Any, tokenizer: Any, batch_tokens: int, report: Report
) -> list[Scored]:
    from luthier.engine.likelihood import log_likelihoods
    from luthier.evaluate.prompts import option_ids

    prompts = [(item.prompt, option) for item in items for option in item.options]
    names = [f"item {item.id}" for item in items for _ in item.options]
    rows = option_ids(asked, prompts, tokenizer)
    found = iter(log_likelihoods(model, rows, batch_tokens=batch_tokens, names=names, on_progress=report))
    scored: list[Scored] = []
    for item in items:
        sums = [next(found) / (len(option) if asked.normalise == "characters" else 1) for option in item.options]
        chosen = max(range(len(sums)), key=sums.__getitem__)  # of equals the first
        scored.append((float(chosen == item.answer), item.options[chosen]))
    return scored


def _pairs(
    asked: PairsSuite, items: Sequence[PairItem], model: Any, tokenizer: Any, batch_tokens: int, report: Report
) -> list[Scored]:
    from luthier.engine.likelihood import log_likelihoods
    from luthier.evaluate.prompts import start_ids, text_ids

    start = start_ids(tokenizer, asked.start_token)
    texts = text_ids([text for item in items for text in (item.good, item.bad)], tokenizer)
    names = [f"item {item.id}" for item in items for _ in range(2)]
    rows = [(start, ids) for ids in texts]
    sums = log_likelihoods(model, rows, batch_tokens=batch_tokens, names=names, on_progress=report)
    return [(float(good > bad), None) for good, bad in zip(sums[::2], sums[1::2], strict=True)]


def _answers(
    asked: GenerateSuite,
    items: Sequence[GenerateItem],
    model: Any,
    tokenizer: Any,
    batch_tokens: int,
    report: Report,
    served: "Served | None",
) -> list[Scored]:
    from luthier.engine.generation import generate
    from luthier.evaluate.prompts import prompt_ids

    check_libraries(asked)
    prompts = prompt_ids(asked, [item.prompt for item in items], tokenizer)
    told: dict[str, Any] = {"max_new_tokens": asked.max_new_tokens, "stop_texts": asked.stop, "on_progress": report}
    if served is not None:
        answers: Sequence[Any] = served.answers(model, prompts, **told)
    else:
        told |= {"batch_rows": BATCH_ROWS, "batch_tokens": KEPT_TOKENS * batch_tokens}
        answers = generate(model, tokenizer, prompts, **told)
    return [(score_answer(asked, item, answer.text), answer.text) for item, answer in zip(items, answers, strict=True)]


def _documents(
    asked: RollingSuite, items: Sequence[RollingItem], model: Any, tokenizer: Any, batch_tokens: int, report: Report
) -> list[Scored]:
    from luthier.engine.likelihood import log_likelihoods, rolling_windows
    from luthier.evaluate.prompts import start_ids, text_ids

    start = start_ids(tokenizer, asked.start_token)
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    window = min(asked.window, room) if room else asked.window
    texts = text_ids([item.text for item in items], tokenizer)
    windows = [rolling_windows(ids, start, window) for ids in texts]
    rows = [pair for of_one in windows for pair in of_one]
    names = [f"item {item.id}" for item, of_one in zip(items, windows, strict=True) for _ in of_one]
    sums = iter(log_likelihoods(model, rows, batch_tokens=batch_tokens, names=names, on_progress=report))
    return [(-sum(next(sums) for _ in of_one) / len(ids), None) for of_one, ids in zip(windows, texts, strict=True)]


_ASK: dict[str, Any] = {"choice": _choices, "pairs": _pairs, "generate": _answers, "rolling": _documents}


def _named(on_progress: "Progress | None", stage: str) -> Report:
    return None if on_progress is None else partial(on_progress, stage)
