"""A version as a folder that others can use, and such folders to and from the Hugging Face Hub.

The folder is PEFT's: adapter_config.json and adapter_model.safetensors as they were registered, with the registry's model card
in place of the one that training wrote, and the bill of materials beside it. Only what is named by its digest leaves: every
file is checked on the way. Logins, mirrors and offline mode are huggingface_hub's own (HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE).
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from luthier.core.atomic import new_folder
from luthier.core.errors import RefusedError, RegistryError
from luthier.formats.note import CARD_FILE, CONFIG_FILE, TENSOR_FILE
from luthier.registry import audit
from luthier.registry.blobs import BlobStore
from luthier.registry.bom import export_bom
from luthier.registry.card import export_card
from luthier.registry.columns import Lifecycle
from luthier.registry.copies import note_copy
from luthier.registry.facts import Facts, facts_of
from luthier.registry.place import Registry
from luthier.registry.versions import find_version

BOM_FILE = "bom.json"
WANTED = ("*.safetensors", "*.json", "*.md", "*.jinja", "*.txt", "*.model")


@dataclass(frozen=True)
class Pulled:
    """An adapter folder that came from the Hub, and the commit that it is of."""

    folder: Path
    repo: str
    commit: str


def leave(registry: Registry, reference: str, location: str, *, actor: str) -> Facts:
    """Record that a version is about to be copied to `location` (a folder, a repository), and return what is known of it.

    The record comes first: an erasure has to know of a copy before there is one. Raises: RefusedError for a version that is held,
    retired or erased, RegistryError.
    """
    with registry.database.writing() as session:
        version = find_version(session, reference)
        facts = facts_of(session, version)
        check_may_leave(facts)
        note_copy(session, "export", location, version_id=version.id)
        audit.record(session, actor, "version.export", f"adapter/{facts.name}/{facts.version}", {"location": location})
    return facts


def export_folder(facts: Facts, blobs: BlobStore, target: Path) -> Path:
    """Write a version to the new folder `target`, with its card and bill of materials; returns the folder.

    Raises: RefusedError for a version that is held, retired or erased, BlobError for a damaged file (nothing is written then),
    StorageError.
    """
    check_may_leave(facts)
    with new_folder(target) as folder:
        for file in facts.files:
            if file.path not in (CARD_FILE, BOM_FILE):
                blobs.fetch(file.digest, folder / file.path)
        (folder / CARD_FILE).write_text(export_card(facts), encoding="utf-8")
        (folder / BOM_FILE).write_text(json.dumps(export_bom(facts), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return target


def check_may_leave(facts: Facts) -> None:
    """Raise RefusedError for a version that nobody may use now: held, retired or erased."""
    if facts.lifecycle != Lifecycle.CANDIDATE:
        raise RefusedError(f"{facts} is {facts.lifecycle}, so it may not leave the registry. Choose another version.")
    if facts.hold_reason:
        raise RefusedError(f"{facts} is on hold ({facts.hold_reason}), so it may not leave the registry. Lift the hold first.")


def push_folder(folder: Path, repo: str, *, message: str, private: bool = True) -> str:
    """Upload an exported folder as the Hub's repository `repo`, which is made if it is not there; returns the commit's URL.

    Raises: RegistryError if the Hub cannot be reached or says no.
    """
    from huggingface_hub import HfApi

    with _told(f"push to {repo}"):
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        done: Any = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
        return str(done.commit_url)


def pull_folder(repo: str, target: Path, *, revision: str | None = None, tell: Callable[[str], None] | None = None) -> Pulled:
    """Fetch the adapter in the Hub's repository `repo` into the new folder `target`: no pickle, nothing that can run.

    Raises: RegistryError if the Hub cannot be reached, or the repository is no adapter in safetensors.
    """
    from huggingface_hub import HfApi, snapshot_download

    with _told(f"pull {repo}"):
        info = HfApi().model_info(repo, revision=revision)
        names = [sibling.rfilename for sibling in info.siblings or []]
        if missing := [name for name in (CONFIG_FILE, TENSOR_FILE) if name not in names]:
            raise RegistryError(
                f"{repo} is no adapter that luthier reads: it lacks {' and '.join(missing)}. "
                f"It holds: {', '.join(sorted(names)[:8]) or 'nothing'}."
            )
        if tell is not None:
            tell(f"Fetching {repo} at {info.sha}")
        wanted = [name for name in names if "/" not in name and any(fnmatch(name, pattern) for pattern in WANTED)]
        with TemporaryDirectory() as scratch:
            # The commit, not the branch: the branch may move between the two calls.
            snapshot_download(repo, revision=info.sha, local_dir=scratch, allow_patterns=wanted)
            with new_folder(target) as folder:
                for name in wanted:
                    shutil.move(Path(scratch) / name, folder / name)
        return Pulled(target, repo, info.sha or "")


@contextmanager
def _told(action: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one sentence that says what to do."""
    from huggingface_hub import constants

    # HTTPError is the base class of the transport in use: httpx in huggingface_hub 1, httpx2 in 2.
    from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise RegistryError(f"Cannot {action}: HF_HUB_OFFLINE forbids the network. Unset it, or export to a folder.")
    try:
        yield
    except GatedRepoError as error:
        raise RegistryError(f"Cannot {action}: it is gated. Accept its terms on the Hub and log in (hf auth login).") from error
    except RevisionNotFoundError as error:
        raise RegistryError(f"Cannot {action}: the Hub has no such revision of it.") from error
    except RepositoryNotFoundError as error:
        raise RegistryError(
            f"Cannot {action}: the Hub has no such repository, or it is private. Check the spelling, or log in (hf auth login)."
        ) from error
    except (HTTPError, ConnectionError, ValueError) as error:
        if isinstance(error, RegistryError):
            raise
        raise RegistryError(f"Cannot {action} at {constants.ENDPOINT}: {error}") from error
