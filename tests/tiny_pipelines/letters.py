"""A tokenizer of letters, for models whose own tokenizers come from the hub."""

from __future__ import annotations

from transformers import Qwen2Tokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "[IMG]", "[IMG_BREAK]", "[IMG_END]")


def letter_tokenizer(chat_template: str | None = None) -> Qwen2Tokenizer:
    """A token a letter or space; everything else is left out."""
    tokens = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz", "\u0120"]
    return Qwen2Tokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[],
        additional_special_tokens=list(SPECIAL[1:]),
        chat_template=chat_template,
    )


def user_template(text: str) -> str:
    """A chat template that leaves everything but the user's message out.

    Args:
        text: of a message, as the template's expression.
    """
    return (
        "<|im_start|>{% for message in messages if message.role == 'user' %}{{ "
        + text
        + " }}{% endfor %}<|im_end|>"
    )
