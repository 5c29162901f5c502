"""Tiny random models of three families, and a tokenizer whose tokens are bytes."""

import copy

import pytest
import torch
from tests.engine_scene import Scene
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

STOP, PAD = 256, 257
VOCABULARY = 263  # not a multiple of anything, and larger than the tokenizer, as padded vocabularies are

CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
    ),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=4, n_positions=96),
    "gemma2": Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=96,
        sliding_window=8,
        final_logit_softcapping=1.5,  # low enough to bend the logits of a random model visibly
    ),
}


@pytest.fixture(autouse=True)
def _one_thread(_same_start):
    """Models this small spend their time waiting for a second thread."""
    torch.set_num_threads(1)


@pytest.fixture(params=sorted(CONFIGS))
def tiny_model(request):
    """A random model of each family in turn."""
    return build(request.param)


@pytest.fixture
def tiny_decoder():
    """One random Llama, for what does not depend on the family."""
    return build("llama")


@pytest.fixture
def tiny_gemma2():
    """One random Gemma 2, which caps its logits softly."""
    return build("gemma2")


@pytest.fixture(scope="session")
def byte_tokenizer():
    """Each byte a token, then the stop token and the padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: token for token, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|stop|>", pad_token="<|pad|>")
    assert (fast.eos_token_id, fast.pad_token_id) == (STOP, PAD)
    return fast


@pytest.fixture(scope="session")
def build_tiny():
    """A factory of random models by family, with settings of the configuration."""
    return build


@pytest.fixture(scope="session")
def scenes(build_tiny, byte_tokenizer, tmp_path_factory):
    """Scenes by family, each made once."""
    made = {}

    def scene(family="llama") -> Scene:
        if family not in made:
            made[family] = Scene(build_tiny(family), byte_tokenizer, tmp_path_factory.mktemp(family))
        return made[family]

    return scene


def build(family, **settings):
    config = copy.deepcopy(CONFIGS[family])
    for name, value in settings.items():
        setattr(config, name, value)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():  # the usual start makes all logits nearly equal; a test of greedy decoding needs clear winners
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model
