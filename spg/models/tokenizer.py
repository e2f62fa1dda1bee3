"""The embedded tokenizer of the tiny model: one token a character, tags whole."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS, MASK, UNKNOWN = "<|pad|>", "<|endoftext|>", "<|mask|>", "<|unknown|>"
TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
CHARACTERS = "0123456789+-*/=()., \n"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: PAD, EOS, MASK, the four tags, digits, operators and white space.

    Other characters become the unknown token, which `Policy.encode` refuses.
    """
    words = [PAD, EOS, MASK, UNKNOWN, *TAGS, *CHARACTERS]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in words[:4]])
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        mask_token=MASK,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
