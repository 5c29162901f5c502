"""`luthier plan`: what a run needs, from a model's configuration alone."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from luthier.cli.output import JSON, make_console, print_json, quiet_transformers
from luthier.core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from luthier.inspect.memory_plan import MemoryPlan, Planner

PATHS = ("fused", "plain", "peft")
PATH_WORDS = {
    "fused": "luthier's fused kernels where it has them for this model (--path plain or peft for the others)",
    "plain": "the model's own modules (train.kernels = 'plain')",
    "peft": "a PEFT model in a transformers Trainer, with its adapter in float32",
}


def plan(
    model: str = typer.Argument(help="Base model: a config.json, or whatever `luthier train --model` takes."),
    method: str = typer.Option("lora", help="Adapter: lora, rslora, dora, adalora, lora+ or lora-fa."),
    rank: list[int] = typer.Option([16], "--rank", "--r", help="Rank; repeated, the first is planned and the table has all."),
    target: list[str] = typer.Option([], help="Module to adapt; repeat it. Default: all linear layers."),
    target_parameter: list[str] = typer.Option([], help="Parameter to adapt, such as a stack of experts; repeat it."),
    save_whole: list[str] = typer.Option([], help="Module to train whole beside the pairs; repeat it."),
    rows: int = typer.Option(4, min=1, help="Rows in one forward pass."),
    length: int = typer.Option(512, min=2, help="Tokens of a row."),
    dtype: str = typer.Option("auto", help="Of the base weights: auto, bfloat16, float32 or float16."),
    checkpointing: bool = typer.Option(False, help="With gradient checkpointing."),
    path: str = typer.Option("fused", help="Which way a step is computed: fused, plain or peft."),
    labelled: float = typer.Option(1.0, min=0.0, max=1.0, help="Share of tokens that are answers; only those need logits."),
    moment_bits: int | None = typer.Option(None, help="Bits of each of AdamW's two moments: 8, 16 or 32. Default: as trained."),
    machines: bool = typer.Option(True, help="Which machines it fits, with the largest batch and length."),
    timed: bool = typer.Option(True, help="Measure how fast this machine multiplies, and say how long a step takes."),
    plot: Path | None = typer.Option(None, help="Draw trained parameters against rank into this PNG."),
    as_json: bool = JSON,
) -> None:
    """Say what LoRA, QLoRA and full fine-tuning need in parameters, memory and time. Loads no weights."""
    console = make_console(as_json)
    if path not in PATHS:
        raise ConfigError(f"there is no path {path!r}.{did_you_mean(path, PATHS)} Known: {', '.join(PATHS)}")
    if moment_bits not in (None, 8, 16, 32):
        raise ConfigError(f"--moment-bits is {moment_bits}; a moment has 8, 16 or 32")
    quiet_transformers()
    from luthier.inspect.counts import RANKS, num_parameters, rank_table, with_rank
    from luthier.inspect.machines import process_memory
    from luthier.inspect.memory_plan import METHODS, Planner, Setting
    from luthier.inspect.pace import measure_pace
    from luthier.inspect.rank_plot import plot_ranks
    from luthier.inspect.step_trace import StepShape
    from luthier.models.blueprint import meta_model, read_config
    from luthier.models.dtype import choose_dtype
    from luthier.train.run import train  # noqa: F401  (what a training process has loaded, since its memory is measured)
    from luthier.train.settings import RunSettings, settings_of

    chosen = settings_of([method])
    given = {"target_modules": target, "target_parameters": target_parameter, "modules_to_save": save_whole}
    lora = chosen.get("lora", {}) | {key: value for key, value in given.items() if value}
    run = {"model": model, "out": "-", "data": {"path": "-"}, "lora": lora}
    config = with_rank(RunSettings(**run).lora, rank[0])  # type: ignore[arg-type]
    freeze_A = bool(chosen.get("train", {}).get("freeze_A"))
    moment_bytes = None if moment_bits is None else moment_bits / 8
    base_config, choice = read_config(model), choose_dtype(dtype)
    base = meta_model(base_config, choice.dtype)
    process_bytes = process_memory()
    table = rank_table(base, config, rank if len(rank) > 1 else RANKS, freeze_A=freeze_A, moment_bytes=moment_bytes or 4)
    shape = StepShape(rows, length, path, checkpointing, "cpu", labelled)  # type: ignore[arg-type]

    def setting(name: Any, device: str) -> Setting:
        on_device = StepShape(**{**vars(shape), "device": device})
        return Setting(name, on_device, moment_bytes, freeze_A and name != "full")

    planner = Planner(base, config, process_bytes)
    plans: dict[str, MemoryPlan] = {name: planner.plan(setting(name, "cpu")) for name in METHODS}
    fits: list[dict[str, Any]] = []
    if machines:
        on_gpu = choose_dtype("bfloat16" if dtype == "auto" else dtype).dtype
        gpu_planner = Planner(meta_model(base_config, on_gpu), config)
        for device, one in (("cpu", planner), ("cuda", gpu_planner)):
            fits += fitting(one, [setting(name, device) for name in METHODS], device)
    found: dict[str, Any] = {
        "model": model,
        "num_parameters": num_parameters(base),
        "dtype": str(choice.dtype).removeprefix("torch."),
        "path": path,
        "adapter": {"method": method, "r": rank[0], "trained": plans["lora"].num_trained, "plan": str(planner.planned)},
        "methods": {name: each.as_dict() for name, each in plans.items()},
        "ranks": [vars(row) for row in table],
        "machines": fits,
    }
    of_lora, of_full = plans["lora"].trace, plans["full"].trace
    if timed and of_lora and of_full:
        pace = measure_pace(of_lora, choice.dtype)
        full = pace.product_seconds * of_full.flops / of_lora.flops
        found["pace"] = {
            "flops_per_second": pace.flops_per_second,
            "threads": pace.num_threads,
            "lora_step_seconds": pace.seconds,
            "full_step_seconds": [full * seconds / pace.product_seconds for seconds in pace.seconds],
            "tokens_per_second": [shape.num_tokens / seconds for seconds in reversed(pace.seconds)],
        }
    if plot is not None:
        plot_ranks(table, found["num_parameters"], plot, f"{model}: {method}")
        found["plot"] = str(plot)
    if as_json:
        print_json(found)
        return
    show(console, found, plans, choice.reason)


def fitting(planner: "Planner", settings: list[Any], device: str) -> list[dict[str, Any]]:
    """Return, for each machine of a kind, what each method takes of it and the largest batch and length that fit.

    Of a model that cannot be traced there is nothing to return.
    """
    from luthier.inspect.machines import CPUS, GPUS, this_machine

    found_growths = {setting.method: planner.growth(setting) for setting in settings}
    growths = {name: growth for name, growth in found_growths.items() if growth is not None}
    if len(growths) < len(settings):
        return []
    found = []
    for machine in (this_machine(), *CPUS) if device == "cpu" else GPUS:
        free = machine.memory_bytes
        methods = {
            name: {
                "fits": each.peak_bytes <= free,
                "largest_rows": each.largest_rows(free),
                "largest_length": each.largest_length(free),
            }
            for name, each in growths.items()
        }
        found.append({"name": machine.name, "kind": device, "memory_bytes": free, "methods": methods})
    return found


def show(console: Any, found: dict[str, Any], plans: "dict[str, MemoryPlan]", why_dtype: str) -> None:
    """Print a plan as tables."""
    from rich.table import Table

    from luthier.train.display import duration, gib

    def known(count: int | None) -> str:
        return "not known" if count is None else gib(count)

    shape = plans["lora"].setting.shape
    console.print(f"{found['model']}: {found['num_parameters']:,} parameters, planned in {why_dtype}")
    console.print(found["adapter"]["plan"], highlight=False)
    console.print(
        f"\nA step of {shape.rows} x {shape.length} tokens on the CPU, by {PATH_WORDS[shape.path]}"
        f"{', with gradient checkpointing' if shape.checkpointing else ''}:"
    )
    memory = Table("", *("LoRA", "QLoRA", "full"))
    for column in memory.columns[1:]:
        column.justify = "right"
    memory.add_row("trained parameters", *(f"{each.num_trained:,}" for each in plans.values()))
    for part in plans["lora"].parts:
        memory.add_row(part, *(known(each.parts[part]) for each in plans.values()))
    memory.add_section()
    for phase in plans["lora"].phases:
        memory.add_row(f"at most, {phase}", *(known(each.phases[phase]) for each in plans.values()))
    memory.add_section()
    memory.add_row("peak", *(("" if each.trace else "more than ") + gib(each.peak_bytes) for each in plans.values()))
    console.print(memory)
    if reason := plans["lora"].untraced:
        console.print(
            f"What a step holds for a while, the machines it fits and its time are not known. {reason}", highlight=False
        )
    if pace := found.get("pace"):
        low, high = pace["lora_step_seconds"]
        console.print(
            f"A LoRA step takes {duration(low)} to {duration(high)} here ({pace['flops_per_second'] / 1e9:,.0f} GFLOP/s measured "
            f"on its products, {pace['threads']} thread(s)): {pace['tokens_per_second'][0]:,.0f} to "
            f"{pace['tokens_per_second'][1]:,.0f} tokens/s. QLoRA also spends time reading weights back from 4 bits."
        )
    ranks = Table("rank", "trained", "of the base", "file", "pairs, gradients, moments")
    for column in ranks.columns:
        column.justify = "right"
    for row in found["ranks"]:
        ranks.add_row(
            str(row["r"]), f"{row['num_trained']:,}", f"{row['share']:.4%}", size(row["file_bytes"]), size(row["state_bytes"])
        )
    console.print(ranks)
    if found["machines"]:
        machines = Table("machine", "memory", "LoRA", "QLoRA", "full", title="most rows of this length; longest rows")
        for machine in found["machines"]:
            cells = [
                f"{each['largest_rows']:,} rows; {each['largest_length']:,} tokens" if each["largest_rows"] else "no"
                for each in machine["methods"].values()
            ]
            machines.add_row(machine["name"], gib(machine["memory_bytes"]), *cells)
        console.print(machines)
        console.print(
            "GPUs in bfloat16 unless --dtype says otherwise; CPU machines with 15 % left to the system; rows no longer than "
            "the model's context."
        )
    if "plot" in found:
        console.print(f"picture: {found['plot']}")


def size(count: int) -> str:
    """Return the size of a file in words."""
    return f"{count / 1e6:,.1f} MB"
