"""Runs `luthier train` again and again, kills it at random moments, and resumes it until it is done. Prints one JSON document.

    python killing.py FOLDER SEEDS -- words of the train command

Each seed gets the run FOLDER/seed-N; FOLDER/whole is never killed. The command runs in forked children of this process, so that
the many starts do not import torch each time. A child is what it would be alone, and SIGKILL is nothing it could prepare for.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import matplotlib.figure  # noqa: F401  imported once, for all children
import transformers.models.llama.modeling_llama  # noqa: F401

import luthier.train.run  # noqa: F401
from luthier.cli.app import main

MOST_KILLS = 3


def start(*words: object) -> int:
    """Start `luthier` with these words in a child, and return its process number."""
    child = os.fork()
    if child:
        return child
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    sys.argv = ["luthier", *map(str, words)]
    status = 1
    try:
        main()
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        os._exit(status)


def finish(child: int) -> None:
    """Wait for a child that must succeed."""
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit(f"a run ended with status {os.waitstatus_to_exitcode(status)}")


def kill_somewhere(child: int, run: Path, dice: random.Random) -> dict[str, object] | None:
    """Kill a child some steps from now, half the time while it writes a checkpoint; None if it was done before."""
    begin = logged(run)
    wanted, in_checkpoint = begin + dice.randint(0, 5), dice.random() < 0.5
    while not os.waitpid(child, os.WNOHANG)[0]:
        writing = any(run.glob("checkpoints/.step-*.tmp"))
        if (run / "config.toml").exists() and logged(run) >= wanted and (writing or not in_checkpoint):
            if not in_checkpoint:
                time.sleep(dice.random() * 0.03)
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if not os.WIFSIGNALED(status):
                return None  # it was done while we slept
            left = [path.name for path in run.glob("checkpoints/.step-*.tmp")]
            return {"lines": logged(run), "left": left}
        time.sleep(0.0005)
    return None


def logged(run: Path) -> int:
    log = run / "run.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def one_life(run: Path, seed: int, words: list[str]) -> list[dict[str, object]]:
    """Carry one run from its start to its end through some kills, and return the kills."""
    dice = random.Random(seed)
    kills: list[dict[str, object]] = []
    child = start("train", *words, "--out", run)
    while len(kills) < MOST_KILLS:
        killed = kill_somewhere(child, run, dice)
        if killed is None:
            return kills
        kills.append(killed)
        child = start("train", "--resume", run)
    finish(child)
    return kills


if __name__ == "__main__":
    folder, seeds, _, *words = sys.argv[1:]
    finish(start("train", *words, "--out", Path(folder) / "whole"))
    print(json.dumps([one_life(Path(folder) / f"seed-{seed}", seed, words) for seed in range(int(seeds))]))
