"""A real vLLM behind a gateway's backend, over a tiny base and adapters that were trained and registered here.

`make test-vllm` names vLLM's python in LUTHIER_VLLM_PYTHON. Nothing is skipped: without it every test here fails.
"""

import asyncio
import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.served_adapters import save_random_adapter
from tests.tiny_run import rows, save_tiny_model
from tests.unfit_adapters import KINDS, MAX_RANK, unfit_folders
from transformers import AutoModelForCausalLM

from luthier.adapt import detach
from luthier.engine import Engine
from luthier.engine.requests import Sampling
from luthier.formats.adapters import fingerprint_of
from luthier.registry.place import open_registry
from luthier.registry.registering import register
from luthier.serve.backend import Ask
from luthier.serve.vllm import VllmBackend, VllmSettings, vllm_backend

SAID = {"actor": "ann", "owner": "team", "no_data_reason": "made by the tests"}
SHAPE = {"hidden": 256, "heads": 4, "kv_heads": 2}  # vLLM's attention on a CPU has no heads of 12
PROMPTS = ["refret plane glue", "sand", "tune carve bend sand oil polish brace bridge nut", "plane string tune carve"]
TOKENS = 16


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """Return the python of vLLM's environment."""
    python = os.environ.get("LUTHIER_VLLM_PYTHON")
    if not python:
        pytest.fail("LUTHIER_VLLM_PYTHON names no python of an environment with vLLM; run these tests with: make test-vllm")
    return Path(python)


@pytest.fixture(scope="session")
def scene(tiny_llama, tiny_tokenizer, tmp_path_factory) -> SimpleNamespace:
    """Return the base, a registry with a trained and some random adapters, and what luthier's own engine answers."""
    place = tmp_path_factory.mktemp("scene")
    base = save_tiny_model(place / "base", tiny_llama, tiny_tokenizer, **SHAPE)
    registry = open_registry(place / "registry", create=True)
    folders = {"trained": train(place, base)}
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    more = {
        "wide": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "rslora": {"r": 3, "use_rslora": True},
        "ranks": {"r": 2, "rank_pattern": {"down_proj": 7}, "alpha_pattern": {"q_proj": 9.5}},
    }
    for seed, (name, config) in enumerate(more.items()):
        folders[name] = save_random_adapter(place / name, model, seed, **config)
        detach(model)
    other, smaller = (tiny_llama(vocab=len(tiny_tokenizer), **SHAPE | change) for change in ({"seed": 9}, {"hidden": 128}))
    unfit = unfit_folders(model, other, smaller, place / "unfit")
    fingerprint = fingerprint_of(model).model_dump()
    for name, folder in (folders | {kind: unfit[kind][0] for kind in KINDS}).items():
        said = None if name == "other_base" else fingerprint  # PEFT's folders say nothing of their base
        register(registry, folder, name=f"acme/{name}", tenant="acme", base=said, **SAID)
    adapters = {f"acme/{name}:1": folder for name, folder in folders.items()}
    prompts = [tuple(tiny_tokenizer(text)["input_ids"]) for text in PROMPTS]
    # Past the model's own stop tokens, so that each answer is of so many tokens; over HTTP they count.
    sampling = Sampling(max_new_tokens=TOKENS, logprobs=2, ignore_eos=True)
    with Engine(model, tiny_tokenizer, adapters=adapters) as engine:
        wanted, texts = (
            {(name, prompt): engine.generate([prompt], name, how)[0] for name in (None, *adapters) for prompt in prompts}
            for how in (sampling, Sampling(max_new_tokens=TOKENS))
        )
    return SimpleNamespace(
        place=place,
        base=base,
        tokenizer=tiny_tokenizer,
        registry=registry,
        adapters=tuple(adapters),
        unfit={f"acme/{kind}:1": unfit[kind][1] for kind in KINDS},
        prompts=prompts,
        sampling=sampling,
        wanted=wanted,
        texts=texts,
    )


def train(place: Path, base: Path) -> Path:
    """Train an adapter until its answers are not the base's, and return its folder."""
    from luthier.train.run import train as run
    from luthier.train.settings import RunSettings

    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(24)))
    settings = {
        "model": str(base),
        "out": str(place / "run"),
        "dtype": "float32",
        "data": {"path": str(place / "rows.jsonl")},
        "lora": {"r": 4},
        "train": {"max_steps": 12, "batch_rows": 6, "compile": "off", "learning_rate": 0.02},
    }
    run(RunSettings(**settings))
    return place / "run" / "adapter"


class Running:
    """A backend in an event loop of its own, for tests that are not coroutines."""

    def __init__(self, backend: VllmBackend):
        self.backend = backend
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.call(backend.start())

    def call(self, coroutine, seconds: float = 600):
        """Run a coroutine there and return what it returns."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(seconds)

    def answer(self, prompt, adapter=None, sampling=None, tenant="acme"):
        """Return the completion of one request."""
        return self.call(self._answer(prompt, adapter, sampling, tenant))

    def answers(self, asked, sampling):
        """Return the completions of many requests that are under way together; `asked` has (prompt, adapter)."""

        async def go():
            return await asyncio.gather(*(self._answer(prompt, adapter, sampling, "acme") for prompt, adapter in asked))

        return self.call(go())

    async def _answer(self, prompt, adapter, sampling, tenant):
        found = [event async for event in self.backend.stream(Ask("req", tuple(prompt), adapter, sampling, tenant))]
        assert "".join(event.text for event in found) == found[-1].completion.text
        return found[-1].completion

    def close(self) -> None:
        """Stop vLLM and the loop."""
        self.call(self.backend.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="session")
def settings(vllm_python) -> VllmSettings:
    """Return how vLLM is started: float32, three adapters in a batch, and an odd number of them in memory."""
    return VllmSettings(
        python=vllm_python, dtype="float32", max_loras=3, max_cpu_loras=5, max_lora_rank=MAX_RANK, kv_gib=1, network="auto"
    )


@pytest.fixture(scope="session")
def vllm(scene, settings):
    """Return a running vLLM."""
    running = Running(vllm_backend(scene.base, scene.tokenizer, settings, registry=str(scene.place / "registry")))
    yield running
    running.close()
