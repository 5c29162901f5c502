"""Does the gateway hold, and what does it cost? Many clients for minutes, some of whom leave, over a real `luthier serve`.

First, what it costs: the same requests are put straight to an engine in this process and through HTTP to the server's, in turns,
as many clients each way. Told are seconds of a core for each token (the gateway's own beside the engine's) and tokens/s; who asks
takes processor time too, here as there. Then the soak: clients draw adapter and prompt, and each answer is compared with the
one that the engine gave to the same request alone, before. An answer that is another adapter's is told by itself. Memory of both
processes is looked at after a fifth of the time and at its end.

The last line on stdout is one JSON document; the exit status is 1 where an answer was wrong or lost, or an error was not a 429.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from serve import work_folder
from serve_many import median_ratio
from serving.work import add_work_flags, write_adapters

from luthier.serve.client import Client, Message
from luthier.serve.load import Asked, LoadSettings, made_up_prompts, run_load, summary

MIB = 2**20


class Server:
    """`luthier serve` as a process, and the engine's below it."""

    def __init__(self, process: "subprocess.Popen[str]", told: dict[str, Any]):
        self.told, self._process = told, process
        self.gateway = psutil.Process(process.pid)
        [self.engine] = self.gateway.children()

    def seconds(self) -> dict[str, float]:
        """Seconds of a core that each process has used."""
        return {name: sum(each.cpu_times()[:2]) for name, each in (("gateway", self.gateway), ("engine", self.engine))}

    def memory(self) -> dict[str, float]:
        """What each process has resident, in MiB."""
        return {name: each.memory_info().rss / MIB for name, each in (("gateway", self.gateway), ("engine", self.engine))}


@contextmanager
def serving(arguments: argparse.Namespace, adapters: dict[str, str], work: Path) -> Iterator[Server]:
    words = ["serve", arguments.model, "--port", "0", "--json", "--dtype", arguments.dtype, "--threads", str(arguments.threads)]
    for name, folder in adapters.items():
        words += ["-a", f"{name}={folder}"]
    words += ["--max-waiting", str(arguments.max_waiting), "--state", str(work / "state")]
    with (work / "serve.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "luthier.cli.app", *words], stdout=subprocess.PIPE, stderr=log, text=True
        )
    assert process.stdout is not None
    try:
        lines: list[str] = []
        while (line := process.stdout.readline()) and line != "}\n":
            lines.append(line)
        if not line:
            raise SystemExit((work / "serve.log").read_text()[-3000:])
        yield Server(process, json.loads("".join(lines) + line))
    finally:
        process.terminate()
        process.wait(60)


class Direct:
    """The engine in this process, asked for the same as the server is."""

    def __init__(self, arguments: argparse.Namespace, adapters: dict[str, str]):
        import torch

        from luthier.engine import Engine, Sampling

        torch.set_num_threads(arguments.threads)
        self.engine = Engine.load(arguments.model, dtype=arguments.dtype, adapters=adapters)
        self.sampling = Sampling(max_new_tokens=arguments.tokens)
        self.tokenizer = self.engine.tokenizer

    def ids(self, messages: list[Message]) -> list[int]:
        return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    def alone(self, messages: list[Message], adapter: str | None) -> str:
        """The answer to one request with nothing beside it."""
        return self.engine.generate([self.ids(messages)], adapter, self.sampling)[0].text

    async def many(self, work: list[tuple[str | None, list[Message]]], clients: int) -> int:
        """Answer all, `clients` at a time; return the tokens."""
        left = iter(work)
        tokens = 0

        async def client() -> None:
            nonlocal tokens
            for adapter, messages in left:
                completion = await self.engine.agenerate(self.ids(messages), adapter=adapter, sampling=self.sampling)
                tokens += len(completion.token_ids)

        await asyncio.gather(*(client() for _ in range(clients)))
        return tokens


async def over_http(client: Client, work: list[tuple[str, list[Message]]], clients: int, max_tokens: int) -> int:
    """As `Direct.many`, through the server."""
    left = iter(work)
    tokens = 0

    async def one() -> None:
        nonlocal tokens
        for model, messages in left:
            async for chunk in client.chat(messages, model, max_tokens=max_tokens, temperature=0):
                if chunk.usage:
                    tokens += chunk.usage["completion_tokens"]

    await asyncio.gather(*(one() for _ in range(clients)))
    return tokens


def cost(
    arguments: argparse.Namespace, server: Server, direct: Direct, names: list[str], prompts: list[list[Message]]
) -> dict[str, Any]:
    """Put the same requests both ways, in turns; return medians for each token, and what the gateway adds to the engine."""
    base = server.told["models"][0]
    rounds: dict[str, list[float]] = {
        key: [] for key in ("direct_cpu", "engine_cpu", "gateway_cpu", "direct_speed", "http_speed")
    }

    async def turns() -> None:
        async with Client(server.told["url"], server.told["key"], connections=arguments.clients) as client:
            for turn in range(arguments.rounds + 1):
                chosen = [(names[n % len(names)], prompts[(n + turn) % len(prompts)]) for n in range(arguments.cost_requests)]
                before, begin = time.process_time(), time.perf_counter()
                tokens = await direct.many([(None if name == base else name, said) for name, said in chosen], arguments.clients)
                spent, seconds = time.process_time() - before, time.perf_counter() - begin
                used, begin = server.seconds(), time.perf_counter()
                told = await over_http(client, chosen, arguments.clients, arguments.tokens)
                http_seconds, after = time.perf_counter() - begin, server.seconds()
                if turn == 0:  # both read their adapters, and what is kept of prompts is filled
                    continue
                rounds["direct_cpu"].append(spent / tokens)
                rounds["direct_speed"].append(tokens / seconds)
                rounds["http_speed"].append(told / http_seconds)
                for name in ("engine", "gateway"):
                    rounds[f"{name}_cpu"].append((after[name] - used[name]) / told)
                print(f"round {turn}: " + ", ".join(f"{key} {values[-1]:.4g}" for key, values in rounds.items()), file=sys.stderr)

    asyncio.run(turns())
    both = [engine + gateway for engine, gateway in zip(rounds["engine_cpu"], rounds["gateway_cpu"], strict=True)]
    return {
        "gateway_of_engine_cpu": median_ratio(rounds["gateway_cpu"], rounds["engine_cpu"]),
        "http_of_direct_cpu": median_ratio(both, rounds["direct_cpu"]),
        "http_of_direct_speed": median_ratio(rounds["http_speed"], rounds["direct_speed"]),
        "cpu_seconds_per_token": {key: values for key, values in rounds.items() if key.endswith("_cpu")},
        "tokens_per_s": {key: values for key, values in rounds.items() if key.endswith("_speed")},
    }


def soak(
    arguments: argparse.Namespace,
    server: Server,
    names: list[str],
    prompts: list[list[Message]],
    known: dict[tuple[str, int], str],
) -> dict[str, Any]:
    """Let many clients ask for minutes; return what they saw."""
    load = LoadSettings(
        clients=arguments.clients,
        seconds=arguments.minutes * 60,
        max_tokens=arguments.tokens,
        zipf=1.0,
        leave=arguments.leave,
        hang_up=arguments.hang_up,
    )
    wrong: Counter[str] = Counter()
    shown: list[dict[str, str]] = []

    def check(asked: Asked) -> None:
        whole = known[asked.model, asked.prompt]
        fits = asked.text == whole if asked.ended == "answered" else whole.startswith(asked.text)
        if asked.ended in ("answered", "left") and not fits:
            others = [name for name in names if asked.text and known[name, asked.prompt].startswith(asked.text)]
            wrong["of another adapter" if others else "different"] += 1
            shown.append({"model": asked.model, "wanted": whole, "got": asked.text})

    memory: dict[str, dict[str, float]] = {}

    async def look(at: float, name: str) -> None:
        await asyncio.sleep(at)
        memory[name] = server.memory()

    async def run() -> tuple[list[Asked], float]:
        begin = time.perf_counter()
        looks = [asyncio.create_task(look(share * load.seconds, name)) for share, name in ((0.2, "at_20"), (1.0, "at_100"))]
        async with Client(server.told["url"], server.told["key"], connections=load.clients) as client:
            done = await run_load(client, names, prompts, load, on_end=check, keeps_text=True)
        seconds = time.perf_counter() - begin
        await asyncio.gather(*looks)
        return done, seconds

    done, seconds = asyncio.run(run())
    told = summary(done, seconds)
    errors = Counter(each.error for each in done if each.error and each.status != 429)
    growth = {name: memory["at_100"][name] / memory["at_20"][name] - 1 for name in ("gateway", "engine")}
    return {**told, "wrong": dict(wrong), "shown": shown[:3], "errors": dict(errors), "memory_mib": memory, "growth": growth}


def leftovers(server: Server) -> dict[str, Any]:
    """Return what the server still has in hand once nobody asks: requests, by its own figures."""

    async def ask() -> str:
        import httpx

        async with httpx.AsyncClient(trust_env=False) as http:
            headers = {"Authorization": f"Bearer {server.told['key']}"}
            return (await http.get(server.told["url"].removesuffix("/v1") + "/metrics", headers=headers)).text

    found: dict[str, Any] = {}
    for _ in range(100):
        page = asyncio.run(ask())
        found = {
            line.split('"')[1]: float(line.split()[-1])
            for line in page.splitlines()
            if line.startswith("luthier_engine_requests{")
        }
        if not any(found.values()):
            break
        time.sleep(0.1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work_flags(parser)
    parser.set_defaults(dtype="float32", tokens=48)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument(
        "--prompts", type=int, default=16, help="different prompts; each with each adapter is answered alone first"
    )
    parser.add_argument("--leave", type=float, default=0.1, help="share of clients that leave in the middle of an answer")
    parser.add_argument("--hang-up", type=float, default=0.05, help="share that leave before the first token")
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison with the engine alone")
    parser.add_argument("--cost-requests", type=int, default=64, help="requests of each round")
    parser.add_argument("--max-waiting", type=int, default=256)
    arguments = parser.parse_args()
    # As `luthier serve` has it for its engine: threads wait as OpenMP has them wait.
    os.environ.pop("OMP_WAIT_POLICY", None)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    from luthier.models import pull

    with work_folder(arguments.work) as work:
        model = pull(arguments.model)
        adapters = write_adapters(work / "adapters", model, [f"a{n}" for n in range(arguments.adapters)], arguments.dtype)
        prompts = made_up_prompts(arguments.prompts, 20, seed=1)
        direct = Direct(arguments, adapters)
        with serving(arguments, adapters, work) as server:
            names = server.told["models"]
            found: dict[str, Any] = {"cost": cost(arguments, server, direct, names, prompts)}
            known = {
                (name, place): direct.alone(said, name if name in adapters else None)
                for name in names
                for place, said in enumerate(prompts)
            }
            found["different_answers"] = len(set(known.values())) / len(known)
            direct.engine.close()
            found["soak"] = soak(arguments, server, names, prompts, known)
            found["left_over"] = leftovers(server)
    found["setting"] = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(arguments).items()
        if key not in ("work", "out")
    }
    line = json.dumps(found)
    if arguments.out:
        arguments.out.write_text(line + "\n")
    print(line)
    bad = found["soak"]["wrong"] or found["soak"]["errors"] or any(found["left_over"].values())
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
