"""Fetch a model from the Hugging Face Hub: safetensors, configuration and tokenizer, nothing that can run.

Pickles and Python files are left on the Hub even where the repository has them. Logins, mirrors and offline mode are
huggingface_hub's own (HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE).
"""

from fnmatch import fnmatch
from pathlib import Path

from luthier.core.errors import ModelError
from luthier.models.weights import PICKLES

WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


def fetch_from_hub(repo: str, revision: str, folder: Path) -> str:
    """Fill `folder` with the model files of `repo` at `revision` ("" is the default branch); return the commit.

    Raises: ModelError if the repository cannot be reached, is not there, or has no safetensors.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    # HTTPError is the base class of the transport in use: httpx in huggingface_hub 1, httpx2 in 2.
    from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    name = f"{repo}@{revision}" if revision else repo
    if constants.HF_HUB_OFFLINE:
        raise ModelError(f"{name} is not in the cache and HF_HUB_OFFLINE forbids the network. Unset it, or name a local folder.")
    try:
        info = HfApi().model_info(repo, revision=revision or None)
        names = [sibling.rfilename for sibling in info.siblings or []]
        check_files(name, names)
        # The commit, not the branch: the branch may move between the two calls.
        snapshot_download(
            repo,
            revision=info.sha,
            local_dir=folder,
            # Top level only: folders such as onnx/ or original/ hold second copies of the weights.
            allow_patterns=[file for file in names if "/" not in file and any(fnmatch(file, pattern) for pattern in WANTED)],
        )
    except GatedRepoError as error:
        raise ModelError(f"{name} is gated: accept its terms on the Hub and log in (hf auth login).") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"The Hub has {repo}, but no revision {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"The Hub has no model {repo!r}, or it is private: check the spelling, or log in (hf auth login)."
        ) from error
    except (HTTPError, ConnectionError) as error:
        raise ModelError(
            f"Cannot fetch {name} from {constants.ENDPOINT}: {error}. A local folder or GGUF file needs no network."
        ) from error
    return info.sha or ""


def check_files(name: str, files: list[str]) -> None:
    """Refuse, before anything is downloaded, a repository luthier could not load.

    Raises: ModelError that says what the repository has instead.
    """
    top_level = [file for file in files if "/" not in file]
    if not any(file.endswith(".safetensors") for file in top_level):
        pickles = [file for file in top_level if any(fnmatch(file, pattern) for pattern in PICKLES)]
        gguf_files = [file for file in top_level if file.endswith(".gguf")]
        if pickles:
            raise ModelError(
                f"{name} has its weights as pickles only ({', '.join(pickles[:3])}), which can run code when opened. "
                "Choose a revision or a copy with safetensors."
            )
        if gguf_files:
            raise ModelError(f"{name} has GGUF files only ({', '.join(gguf_files[:3])}). Download one and name the file.")
        raise ModelError(f"{name} has no model.safetensors; it holds: {', '.join(top_level[:8]) or 'nothing'}.")
    if "config.json" not in top_level:
        raise ModelError(f"{name} has no config.json, so it is not a whole model (an adapter?). Name its base model instead.")
