"""`luthier merge`: an adapter folded into its base, as a checkpoint that plain transformers reads."""

from pathlib import Path

import typer

from luthier.cli.output import DTYPE, FORCE, JSON, MODEL, QUANTIZE, make_console, print_json

PROBE = "The quick brown fox jumps over the lazy dog, and then it asks: what is 12 times 12?"


def merge(
    adapter: str = typer.Argument(help="Adapter folder, or the folder of a run."),
    out: Path = typer.Argument(help="New folder for the merged model."),
    model: str | None = MODEL,
    dtype: str = DTYPE,
    quantize: str | None = QUANTIZE,
    force: bool = FORCE,
    as_json: bool = JSON,
) -> None:
    """Fold an adapter into its base, write the merged model, and say how far its answers are from the adapter's."""
    console = make_console(as_json)
    from luthier.cli.loading import load

    loaded = load(model, adapter, dtype=dtype, quantize=quantize, console=console, force=force)
    from luthier.formats.merged import merge_difference, save_merged

    ids = loaded.base.tokenizer(PROBE, return_tensors="pt")["input_ids"].to(loaded.base.model.device)
    difference = merge_difference(loaded.base.model, ids)
    save_merged(loaded.base.model, out, tokenizer=loaded.base.tokenizer)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    dtype_name = str(loaded.base.dtype_choice.dtype).removeprefix("torch.")
    console.print(f"Merged into {out} ({size / 1e6:,.0f} MB, {dtype_name}).")
    console.print(
        f"On a probe text its logits differ from the adapter's by {difference.relative:.1e} of their size at most; "
        f"the likeliest token is the same at {difference.same_top:.0%} of the positions."
    )
    console.print(f"next: luthier generate --model {out} 'your prompt'", soft_wrap=True)
    if as_json:
        print_json({"out": str(out), "bytes": size, "relative_difference": difference.relative, "same_top": difference.same_top})
