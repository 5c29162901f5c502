"""A tiny base in a folder, as vLLM would be given it."""

from pathlib import Path

import pytest
from tests.unfit_adapters import unfit_folders
from transformers import AutoModelForCausalLM

from luthier.serve.vllm.checking import Served


@pytest.fixture(scope="module")
def base_folder(tiny_llama, tmp_path_factory) -> Path:
    """Return its folder."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base_model(base_folder):
    """Return the base as a live model, read from its folder as whoever trains on it reads it."""
    return AutoModelForCausalLM.from_pretrained(base_folder).eval()


@pytest.fixture(scope="module")
def served(base_folder) -> Served:
    """Return what is known of it."""
    return Served.of_folder(base_folder)


@pytest.fixture(scope="module")
def unfit(tiny_llama, base_model, tmp_path_factory):
    """Return adapters that vLLM must not serve, by kind."""
    place = tmp_path_factory.mktemp("unfit")
    return unfit_folders(base_model, tiny_llama(seed=9), tiny_llama(hidden=32), place)
