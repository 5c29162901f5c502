"""`luthier eval`: base and adapter on the same held-out rows, or on suites, side by side."""

from pathlib import Path
from typing import Any

import typer

from luthier.cli.output import DTYPE, FORCE, JSON, MODEL, QUANTIZE, json_text, make_console, print_json
from luthier.cli.progress import progress_bar
from luthier.cli.suites import evaluate_suites
from luthier.core.errors import ConfigError


def evaluate(
    adapter: str = typer.Argument(help="Adapter folder, or the folder of a run."),
    data: str | None = typer.Option(None, "--data", "-d", help="Held-out rows. Default: those the run named."),
    model: str | None = MODEL,
    suite: list[str] = typer.Option(
        [],
        "--suite",
        "-s",
        help="Instead of rows: 'general', one of its parts, a suite file, or NAME=PATH of a public suite; repeatable.",
    ),
    limit: int | None = typer.Option(None, min=1, help="Judge only so many rows, or items of each suite."),
    max_new_tokens: int = typer.Option(128, min=1, help="Longest answer, in tokens."),
    batch_rows: int = typer.Option(32, min=1, help="Rows answered at once."),
    batch_tokens: int = typer.Option(2048, min=1, help="With --suite: tokens in one forward pass, padding included."),
    remember: bool = typer.Option(True, help="With --suite: keep what the base scored, and use what is kept."),
    case_folded: bool = typer.Option(False, help="Upper and lower case count as the same."),
    prompt: str | None = typer.Option(None, help="Jinja template for the request. Default: the one trained with."),
    completion: str | None = typer.Option(None, help="Jinja template for the answer. Default: the one trained with."),
    system: str | None = typer.Option(None, help="System message. Default: the one trained with."),
    samples: int = typer.Option(4, min=0, help="Rows to show side by side."),
    save: Path | None = typer.Option(
        None, help="Write everything, each row's answers included, to this JSON file (and to NAME-base.json with --suite)."
    ),
    dtype: str = DTYPE,
    quantize: str | None = QUANTIZE,
    force: bool = FORCE,
    as_json: bool = JSON,
) -> None:
    """Judge an adapter against its base: held-out loss, exact match, JSON fields, and what changed for better or worse.

    With --suite both are put to suites instead: choices, minimal pairs, answers scored by a rule, likelihood of documents.
    """
    console = make_console(as_json)
    if suite:
        about_rows = {"--data": data, "--prompt": prompt, "--completion": completion, "--system": system}
        if given := [name for name, value in about_rows.items() if value is not None]:
            raise ConfigError(
                f"{', '.join(given)} would have no effect with --suite, which brings its own items; judge rows apart"
            )
        evaluate_suites(
            adapter,
            suite,
            model=model,
            limit=limit,
            batch_tokens=batch_tokens,
            save=save,
            remember=remember,
            dtype=dtype,
            quantize=quantize,
            force=force,
            as_json=as_json,
            console=console,
        )
        return
    from luthier.cli.loading import load_served, recipe_of

    trained_with = recipe_of(adapter).get("data", {})
    path = data or trained_with.get("eval_path")
    if path is None:
        raise ConfigError("the run names no file of held-out rows; say which with --data")
    from luthier.core.atomic import write_atomic
    from luthier.data.encode import encode
    from luthier.data.messages import to_examples
    from luthier.data.read import read_rows
    from luthier.evaluate.judgement import judge
    from luthier.evaluate.report import judgement_report

    examples = to_examples(
        read_rows(path, limit=limit).rows,
        prompt_template=trained_with.get("prompt") if prompt is None else prompt,
        completion_template=trained_with.get("completion") if completion is None else completion,
        system=trained_with.get("system") if system is None else system,
    )
    where: dict[str, Any] = {"dtype": dtype, "quantize": quantize, "console": console, "force": force}
    with load_served(model, adapter, rows=batch_rows, **where) as loaded, progress_bar(console) as on_progress:
        encoded = encode(examples, loaded.base.tokenizer, max_length=trained_with.get("max_length", 4096))
        judgement = judge(
            loaded.base.model,
            loaded.base.tokenizer,
            examples,
            encoded=encoded.rows,
            max_new_tokens=max_new_tokens,
            batch_rows=batch_rows,
            case_folded=case_folded,
            served=loaded.served,
            on_progress=on_progress,
        )
    console.print(judgement_report(judgement, samples=samples))
    result = {"data": str(path), "model": str(loaded.base.spec), "adapter": adapter} | judgement.as_dict()
    if save is not None:
        write_atomic(save, json_text(result))
        console.print(f"Every row is in {save}.")
    if as_json:
        result.pop("samples")
        print_json(result)
