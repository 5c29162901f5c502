"""What do weights in fewer bits give a single stream, and what do they cost? The engine with float, int8, int4 and NF4 weights.

One engine for each form in one process; in each round each takes its turn: an answer of --tokens tokens to a short prompt,
bare and with an adapter (r=16 on all linear layers), and a long prompt read. Medians over the rounds; a ratio is the median of
the ratios inside a round, above 1 where the form is faster than floats. `nats_per_token` is what each finds text to cost.
The last line on stdout is one JSON document.
"""

import argparse
import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from serving.work import add_work_flags, make_prompts, write_adapters

LONG = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work_flags(parser)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--long", type=int, default=LONG, help="tokens of the long prompt")
    parser.add_argument("--texts", type=int, default=16, help="texts whose cost is taken")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    with ExitStack() as stack:
        folder = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        result = measure(stack, arguments, folder)
    for form, row in result["forms"].items():
        told = "  ".join(f"{name} {value:.3g}" for name, value in row.items())
        print(f"{form:>6}  {told}")
    print(json.dumps(result))
    if arguments.out:
        arguments.out.write_text(json.dumps(result) + "\n")


def measure(stack: ExitStack, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from luthier.engine import Engine
    from luthier.models import load_model
    from luthier.ops.prepacked import FORMS

    path = load_model(arguments.model, dtype=arguments.dtype).path
    adapters = write_adapters(folder, path, ["a"], arguments.dtype)
    short, long, *texts = make_prompts(arguments, path, [24, arguments.long, *[96] * arguments.texts])[0]
    load = {"dtype": arguments.dtype, "adapters": adapters, "prefix_cache": False}
    engines = {form: stack.enter_context(Engine.load(arguments.model, form=form, **load)) for form in FORMS}
    cost = {form: nats(engine, texts) for form, engine in engines.items()}
    taken: dict[str, dict[str, list[float]]] = {form: {} for form in FORMS}
    for turn in range(arguments.rounds + 1):
        for form, engine in engines.items():
            rates = rates_of(engine, short, long, arguments.tokens)
            for name, rate in rates.items():
                taken[form].setdefault(name, []).extend([rate] if turn else [])  # the first turn warms up
    forms = {
        form: {name: statistics.median(rates) for name, rates in by_name.items()} | {"nats_per_token": cost[form]}
        for form, by_name in taken.items()
    }
    over = {
        f"{form}_{name}_vs_float": statistics.median(a / b for a, b in zip(rates, taken["float"][name], strict=True))
        for form, by_name in taken.items()
        for name, rates in by_name.items()
        if form != "float"
    }
    setting = {name: getattr(arguments, name) for name in ("dtype", "threads", "rounds", "tokens", "long")}
    return {"forms": forms, **over, **setting}


def rates_of(engine: Any, short: list[int], long: list[int], tokens: int) -> dict[str, float]:
    """Tokens a second after the first one, bare and with the adapter, and prompt tokens a second."""
    from luthier.engine import Sampling

    answer = Sampling(max_new_tokens=tokens, ignore_eos=True)
    rates = {}
    for name, adapter in (("single", None), ("single_adapter", "a")):
        [done] = engine.generate([short], adapter, answer)
        rates[name] = (len(done.token_ids) - 1) / (done.seconds - done.first_token_seconds)
    start = time.perf_counter()
    engine.generate([long], None, Sampling(max_new_tokens=1, ignore_eos=True))
    return rates | {"prefill": len(long) / (time.perf_counter() - start)}


def nats(engine: Any, texts: list[list[int]]) -> float:
    found = engine.score([(text[:1], text[1:]) for text in texts])
    return -sum(map(sum, found)) / sum(map(len, found))


if __name__ == "__main__":
    main()
