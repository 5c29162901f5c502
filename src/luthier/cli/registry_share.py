"""`luthier registry export-card | export-bom | export | push | pull`: versions for people, auditors and other machines."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from luthier.cli.output import JSON, make_console, print_json
from luthier.cli.registry_opening import ACTOR, REGISTRY, VERSION, caller, opened
from luthier.core.errors import ConfigError

if TYPE_CHECKING:
    from luthier.registry.facts import Facts

FILE = typer.Option(None, "--out", "-o", help="File to write. Default: print it.")


def export_card(reference: str = VERSION, out: Path | None = FILE, registry: str | None = REGISTRY) -> None:
    """Print a version's model card, as the Hugging Face Hub reads it."""
    from luthier.registry.card import export_card as card

    _give(card(_facts(reference, registry)), out)


def export_bom(reference: str = VERSION, out: Path | None = FILE, registry: str | None = REGISTRY) -> None:
    """Print a version's bill of materials: CycloneDX 1.7, with its base, data, scores and gate decision."""
    from luthier.registry.bom import export_bom as bom

    _give(json.dumps(bom(_facts(reference, registry)), indent=2, ensure_ascii=False), out)


def export(
    reference: str = VERSION,
    folder: Path = typer.Argument(help="New folder."),
    actor: str | None = ACTOR,
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Write a version to a folder in PEFT's format, with its card and bill of materials; the copy is recorded."""
    console = make_console(as_json)
    from luthier.registry.exchange import export_folder, leave

    store = opened(registry)
    facts = leave(store, reference, str(folder.absolute()), actor=caller(store, actor, "register"))
    export_folder(facts, store.blobs, folder)
    console.print(f"{facts} is in {folder}", highlight=False, soft_wrap=True)
    if as_json:
        print_json({"version": str(facts), "folder": str(folder), "manifest": facts.manifest_digest})


def push(
    reference: str = VERSION,
    repo: str = typer.Argument(help="Repository on the Hub, OWNER/NAME; made if it is not there."),
    public: bool = typer.Option(False, "--public", help="Make a new repository public."),
    actor: str | None = ACTOR,
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Upload a version to the Hugging Face Hub, with its card and bill of materials; the copy is recorded."""
    console = make_console(as_json)
    from tempfile import TemporaryDirectory

    from luthier.registry.exchange import export_folder, leave, push_folder

    store = opened(registry)
    facts = leave(store, reference, f"hub:{repo}", actor=caller(store, actor, "register"))
    with TemporaryDirectory() as scratch:
        folder = export_folder(facts, store.blobs, Path(scratch) / "adapter")
        url = push_folder(folder, repo, message=str(facts), private=not public)
    console.print(f"{facts} is at {url}", highlight=False, soft_wrap=True)
    if as_json:
        print_json({"version": str(facts), "repo": repo, "commit_url": url, "manifest": facts.manifest_digest})


def pull(
    repo: str = typer.Argument(help="Repository on the Hub, OWNER/NAME."),
    out: Path | None = typer.Option(None, "--out", "-o", help="New folder. Default: NAME."),
    revision: str | None = typer.Option(None, help="Branch, tag or commit."),
    as_json: bool = JSON,
) -> None:
    """Fetch an adapter from the Hugging Face Hub into a folder: no pickle, nothing that can run."""
    console = make_console(as_json)
    from luthier.registry.exchange import pull_folder

    folder = out or Path(repo.rpartition("/")[2])
    if folder.exists():
        raise ConfigError(f"{folder} is there already; choose another folder with --out")
    pulled = pull_folder(repo, folder, revision=revision, tell=lambda message: console.print(message, style="dim"))
    console.print(f"{repo} at {pulled.commit[:12]} is in {folder}", highlight=False, soft_wrap=True)
    console.print(f"Register it with: luthier registry add {folder} --name NAME", style="dim", highlight=False, soft_wrap=True)
    if as_json:
        print_json({"repo": repo, "commit": pulled.commit, "folder": str(folder)})


def _facts(reference: str, registry: str | None) -> "Facts":
    from luthier.registry.facts import facts_of
    from luthier.registry.versions import find_version

    with opened(registry).database.reading() as session:
        return facts_of(session, find_version(session, reference))


def _give(text: str, out: Path | None) -> None:
    from luthier.core.atomic import write_atomic

    if out is None:
        typer.echo(text)
    else:
        write_atomic(out, text if text.endswith("\n") else text + "\n")
