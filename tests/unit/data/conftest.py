"""Small real tokenizers with the chat templates that matter: each marks, rewrites or closes an answer in its own way."""

from collections.abc import Callable
from functools import cache

import pytest
from transformers import PreTrainedTokenizerFast

Tokenizers = Callable[..., PreTrainedTokenizerFast]

# SmolLM2-135M-Instruct's own: it puts in a system message where there is none.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Llama 3's shape: bos in the template, content trimmed, an empty line before each text.
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Qwen3's habit: thinking is taken out of every answer but the last.
FORGETS_THINKING = (
    "{% for message in messages %}{% set said = message['content'] %}"
    "{% if message['role'] == 'assistant' and not loop.last %}{% set said = said.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + said + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Phi-3's habit: the whole text ends with eos, but only where nothing is asked.
ENDS_WITH_EOS = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
NO_STOP = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
# DeepSeek R1's habit: it asks with <think>, and takes the thinking out of every answer, the last one too.
ASKS_WITH_THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'].split('</think>')[-1] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
# Mistral's and Gemma's habit: roles must alternate.
REFUSES_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}" + LLAMA3

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin|>", "<|eot_id|>", "<|end|>", "<|assistant|>", "<|user|>"]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>"]
CORPUS = [
    "Refret my jazz bass by Friday, please.\n\nAnd the strings?\n",
    '{"task": "refret", "due": "Friday"} assistant user system\n',
    "Grüße aus Málaga: 日本語 und 😀, twice 😀.\n\n\n  The spruce top rings.",
    *["At the end of a text two newlines are one token.\n\n"] * 9,
]


@pytest.fixture(scope="session")
def make_tokenizer() -> Tokenizers:
    """Return a factory of byte-level BPE tokenizers; `puts_bos` gives them Llama's post-processor, `trims` GPT-2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    @cache
    def make(
        template: str | None, *, eos: str | None = "<|im_end|>", puts_bos: bool = False, trims: bool = False
    ) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=411, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        tokenizer.train_from_iterator(CORPUS, trainer)
        if puts_bos:
            tokenizer.post_processor = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", 3)])
        elif trims:
            tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        # pad == eos, as in most small models: a mask by id would take the stop token out of the labels.
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token=eos, pad_token=eos, chat_template=template
        )

    return make


@pytest.fixture(scope="session")
def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer like Llama 2's, which puts a space before every text it is given."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    letters = [chr(code) for code in range(32, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=211, special_tokens=["<unk>", "</s>"], initial_alphabet=[*letters, "▁", "\n"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
