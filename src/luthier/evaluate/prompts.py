"""From a suite's items to token ids: through the chat template or as plain text, with worked examples and a start token in front.

Plain text begins with one token that stands for the start of a document, as it did in pretraining. Many tokenizers do not put it
there, and their `bos_token` may be another: SmolLM2's is <|im_start|>, with which it tells 0.66 of BLiMP's pairs apart instead of
0.77. So the separator of documents comes before bos. Never calls a model.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ConfigError, DataError
from luthier.data.encode import encode_continuations, leading_ids, render_prompt
from luthier.data.messages import Example, Message

if TYPE_CHECKING:
    from luthier.evaluate.definitions import ChoiceSuite, GenerateSuite

SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>")
"""What families without a bos of their own put between documents."""


def start_ids(tokenizer: Any, start_token: str = "auto") -> list[int]:
    """Return the ids that stand in front of plain text. Raises: ConfigError for a token that is none; DataError without any."""
    known = tokenizer.get_vocab()
    if start_token != "auto":
        if start_token not in known:
            raise ConfigError(f"start_token is {start_token!r}, which is no token of this tokenizer; write auto or one it has")
        return [known[start_token]]
    if own := leading_ids(tokenizer):
        return own
    specials = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    for separator in (*(each for each in SEPARATORS if each in specials), tokenizer.bos_token, tokenizer.eos_token):
        if separator is not None:
            return [known[separator]]
    raise DataError("this tokenizer has no token that could stand before a text; name one as start_token in the suite")


def asks_in_chat(asked: "ChoiceSuite | GenerateSuite", tokenizer: Any) -> bool:
    """Whether the suite's prompts go through the chat template: it wants that, and there is one."""
    return asked.chat and bool(tokenizer.chat_template)


def prompt_ids(asked: "GenerateSuite", prompts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return the ids of what the model is given before it answers."""
    if asks_in_chat(asked, tokenizer):
        return [_chat_ids(asked, prompt, tokenizer) for prompt in prompts]
    start = start_ids(tokenizer, asked.start_token)
    ending = "\n" if asked.chat else ""
    return [[*start, *ids] for ids, _ in encode_continuations([(_plain(asked, each, ending), "") for each in prompts], tokenizer)]


def option_ids(asked: "ChoiceSuite", prompts: Sequence[tuple[str, str]], tokenizer: Any) -> "list[tuple[list[int], list[int]]]":
    """Return (context, continuation) for each (prompt, option)."""
    if asks_in_chat(asked, tokenizer):
        contexts = {prompt: _chat_ids(asked, prompt, tokenizer) for prompt, _ in prompts}
        options = encode_continuations([("", option) for _, option in prompts], tokenizer)
        return [(contexts[prompt], ids) for (prompt, _), (_, ids) in zip(prompts, options, strict=True)]
    start = start_ids(tokenizer, asked.start_token)
    between = delimiter(asked)
    texts = [(_plain(asked, prompt, ""), (between if prompt else "") + option) for prompt, option in prompts]
    return [([*start, *context], rest) for context, rest in encode_continuations(texts, tokenizer)]


def delimiter(asked: "ChoiceSuite | GenerateSuite") -> str:
    """Return what stands between a plain prompt and its answer in worked examples, and before options."""
    own = getattr(asked, "delimiter", None)
    return (own if own is not None else " ") if not asked.chat else "\n"


def text_ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return the ids of whole texts, without a start token."""
    return [rest for _, rest in encode_continuations([("", text) for text in texts], tokenizer)]


def _chat_ids(asked: "ChoiceSuite | GenerateSuite", prompt: str, tokenizer: Any) -> list[int]:
    turns = [Message("system", asked.system)] if asked.system else []
    for shot in asked.shots:
        turns += [Message("user", shot.prompt), Message("assistant", shot.answer)]
    # The last answer is only there to be asked for; its text is never rendered.
    return render_prompt(Example(0, (*turns, Message("user", prompt), Message("assistant", "?"))), tokenizer)


def _plain(asked: "ChoiceSuite | GenerateSuite", prompt: str, ending: str) -> str:
    between = delimiter(asked)
    before = "".join(f"{shot.prompt}{between}{shot.answer}\n\n" for shot in asked.shots)
    return (f"{asked.system}\n\n" if asked.system else "") + before + prompt + (ending if not prompt[-1:].isspace() else "")
