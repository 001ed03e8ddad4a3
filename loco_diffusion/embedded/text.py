"""The packaged tokenizers and text encoders: small, but of the classes that FLUX uses.

Both vocabularies hold every word of the scenes' captions whole and spell anything else letter by letter, so any
prompt can be read. The encoders start at random and learn together with the base model.
"""

from __future__ import annotations

import json
import re

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from loco_diffusion.data.scenes import TRAIN_SEEDS, sample_scene

TEXT_LENGTH = 36  # the longest caption has 33 tokens
CLIP_LENGTH = 77
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"-()"


def build_tokenizers() -> tuple[CLIPTokenizer, T5Tokenizer]:
    """Vocabularies of the captions' words; always the same."""
    captions = [sample_scene(seed).caption for seed in TRAIN_SEEDS[:2000]]
    words = sorted(set(re.findall(r"[a-z]+", " ".join(captions))))
    return _clip_tokenizer(captions), _t5_tokenizer(words)


def _clip_tokenizer(captions: list[str]) -> CLIPTokenizer:
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(",", "isolated"), pre_tokenizers.WhitespaceSplit()]
    )
    alphabet = [letter + end for letter in _LETTERS for end in ("", "</w>")]
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1000, end_of_word_suffix="</w>", special_tokens=special + alphabet, show_progress=False
    )
    trained.train_from_iterator(captions, trainer)
    return CLIPTokenizer(
        vocab=trained.get_vocab(),
        merges=[tuple(pair) for pair in _merges(trained)],
        model_max_length=CLIP_LENGTH,
    )


def _merges(tokenizer: Tokenizer) -> list[list[str]]:
    return json.loads(tokenizer.to_str())["model"]["merges"]


def _t5_tokenizer(words: list[str]) -> T5Tokenizer:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    whole = [(f"▁{word}", -1.0) for word in words + [word.capitalize() for word in words]]
    letters = [("▁", -10.0)] + [(letter, -10.0) for letter in sorted(set(_LETTERS + _LETTERS.upper()))]
    return T5Tokenizer(vocab=special + whole + letters, extra_ids=0, model_max_length=TEXT_LENGTH)


@torch.no_grad()
def share_capitals(t5: T5Tokenizer, encoder: T5EncoderModel) -> None:
    """Give "Red" the meaning of "red": captions hold no capitals, and a T5 tokenizer keeps them."""
    table = encoder.get_input_embeddings().weight
    vocabulary = t5.get_vocab()
    for piece, index in vocabulary.items():
        table[index] = table[vocabulary.get(piece.lower(), index)]


def build_text_encoders(clip: CLIPTokenizer, t5: T5Tokenizer) -> tuple[CLIPTextModel, T5EncoderModel]:
    """Untrained encoders: CLIP's pooled output has 64 features, T5's sequence 128."""
    torch.manual_seed(0)
    clip_config = clip_config_of(clip, width=64, layers=1, heads=2)
    t5_config = T5Config(
        vocab_size=len(t5),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return CLIPTextModel(clip_config), T5EncoderModel(t5_config)


def clip_config_of(clip: CLIPTokenizer, width: int, layers: int, heads: int) -> CLIPTextConfig:
    """Of a text encoder for texts as long as the tokenizer's limit."""
    return CLIPTextConfig(
        vocab_size=len(clip),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=clip.model_max_length,
        bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id,
        pad_token_id=clip.pad_token_id,
    )
