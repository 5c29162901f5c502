"""`luthier merge`: an adapter folded into its base, as a checkpoint that plain transformers reads."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from luthier.cli.output import DTYPE, FORCE, JSON, MODEL, QUANTIZE, make_console, print_json

if TYPE_CHECKING:
    from luthier.inspect.survival import MergeSurvival

PROBE = "The quick brown fox jumps over the lazy dog, and then it asks: what is 12 times 12?"


def merge(
    adapter: str = typer.Argument(help="Adapter folder, or the folder of a run."),
    out: Path = typer.Argument(help="New folder for the merged model."),
    model: str | None = MODEL,
    to: str = typer.Option("dense", help="dense: every weight in --dtype; nf4: linear layers in 4 bits, which loses more."),
    dtype: str = DTYPE,
    quantize: str | None = QUANTIZE,
    force: bool = FORCE,
    as_json: bool = JSON,
) -> None:
    """Fold an adapter into its base, write the merged model, and say how much of the adapter is left in it."""
    console = make_console(as_json)
    from luthier.cli.loading import load
    from luthier.formats.merged import check_written, merge_difference, save_merged

    check_written(to)
    loaded = load(model, adapter, dtype=dtype, quantize=quantize, console=console, force=force)
    from luthier.inspect.survival import NF4, merge_survival

    survival = merge_survival(loaded.base.model)
    ids = loaded.base.tokenizer(PROBE, return_tensors="pt")["input_ids"].to(loaded.base.model.device)
    difference = merge_difference(loaded.base.model, ids, to=to)
    save_merged(loaded.base.model, out, to=to, tokenizer=loaded.base.tokenizer)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    dtype_name = str(loaded.base.dtype_choice.dtype).removeprefix("torch.")
    form = NF4 if to == NF4 else dtype_name
    show(console, survival, form)
    lost = survival.total.exports[form]
    if to == NF4:
        console.print(
            f"Written in 4 bits, as asked: {lost.kept:.1%} of the adapter's change is left, under an error {lost.error:,.2f} "
            "times its size. Without --to nothing is put into 4 bits.",
            style="bold",
        )
    console.print(f"Merged into {out} ({size / 1e6:,.0f} MB, {form}).")
    console.print(
        f"On a probe text its logits differ from the adapter's by {difference.relative:.1e} of their size at most; "
        f"the likeliest token is the same at {difference.same_top:.0%} of the positions."
    )
    console.print(f"next: luthier generate --model {out} 'your prompt'", soft_wrap=True)
    if as_json:
        print_json(
            {
                "out": str(out),
                "bytes": size,
                "written": form,
                "relative_difference": difference.relative,
                "same_top": difference.same_top,
                "survival": survival.as_dict(),
            }
        )


def show(console: Any, survival: "MergeSurvival", form: str) -> None:
    """Print what each form leaves of the adapter's change; the one that is written is marked."""
    from rich.table import Table

    forms = list(survival.total.exports)
    table = Table("", "", "|D| / |W|", *(f"{name} *" if name == form else name for name in forms))
    for column in table.columns[1:]:
        column.justify = "right"
    for each in (*survival.kinds, survival.total):
        if each is survival.total:
            table.add_section()
        cells = (f"{left.kept:.2%}, {left.error:.2g}" for left in each.exports.values())
        table.add_row(each.kind, str(each.num_parameters), f"{each.share:.3%}", *cells)
    console.print(table)
    console.print(f"Of the change D: the share that each form keeps, and its error relative to D. * is what is written ({form}).")
    for remark in survival.remarks:
        console.print(remark)
