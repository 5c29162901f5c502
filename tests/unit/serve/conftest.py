"""A gateway over a tiny random Llama with two adapters, running for the tests of a file, and OpenAI's client for it."""

import openai
import pytest
import torch
from tests.serve_scene import gateway_over


@pytest.fixture(autouse=True)
def _one_thread(_same_start):
    """Models this small spend their time waiting for a second thread."""
    torch.set_num_threads(1)


@pytest.fixture(scope="package")
def tiny_base(tiny_llama, tiny_tokenizer):
    """A random Llama whose vocabulary is the tokenizer's, with room for some turns, and clear winners among its logits."""
    model = tiny_llama(vocab=len(tiny_tokenizer), max_position_embeddings=1024, seed=3)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    model.generation_config.eos_token_id = tiny_tokenizer.eos_token_id
    return model


@pytest.fixture(scope="module")
def served(tiny_base, tiny_tokenizer, tmp_path_factory):
    """The gateway: url, key, engine, app. Its models are the base "tiny" and the adapters "alpha" and "beta"."""
    with gateway_over(tiny_base, tiny_tokenizer, tmp_path_factory.mktemp("adapters"), adapters=("alpha", "beta")) as running:
        yield running


@pytest.fixture(scope="module")
def client(served):
    """OpenAI's own client, which never tries again by itself."""
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=served.key, max_retries=0) as made:
        yield made
