"""Tokenizers: the tiny model's (one token a character), the toy model's (one a byte), and published ones."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from spg.core.errors import InputError
from spg.models.hub import TOKENIZER, fetch

PAD, EOS, MASK, UNKNOWN = "<|pad|>", "<|endoftext|>", "<|mask|>", "<|unknown|>"
TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
CHARACTERS = "0123456789+-*/=()., \n"
# the published form of a completion, which a random model would never write byte by byte
FORM = ("<reasoning>\n", "\n</reasoning>\n<answer>\n", "\n</answer>\n")
# LLaDA's special tokens; in its own tokenizer they are 126080, 126081, 126336, 126346, 126347 and 126348
BEGIN, LLADA_MASK = "<|startoftext|>", "<|mdm_mask|>"
HEADER, HEADER_END, END_OF_TURN = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
# the chat template of LLaDA's instruction-tuned models, which always opens an answer
LLADA_CHAT = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    f"{HEADER}{{{{ message['role'] }}}}{HEADER_END}\n\n{{{{ message['content'] | trim }}}}{END_OF_TURN}"
    "{% endfor %}"
    f"{HEADER}assistant{HEADER_END}\n\n"
    # Jinja drops one line feed at the very end of a template
    "{{ '' }}"
)


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


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of 256 bytes with the special tokens and the chat template of LLaDA; EOS pads.

    The tags of the published completions are one token each, with their line feeds, so that a random model
    sometimes writes them and is rewarded. Every text can be encoded and is decoded exactly, except for the
    names of special tokens.
    """
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [BEGIN, EOS, LLADA_MASK, HEADER, HEADER_END, END_OF_TURN]
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in special])
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in FORM])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=EOS,
        pad_token=EOS,
        mask_token=LLADA_MASK,
        chat_template=LLADA_CHAT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def pretrained(
    path: str,
    revision: str | None = None,
    mask_token: str | None = None,
    eos_token: str | None = None,
    pad_token: str | None = None,
    chat: bool = True,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a published model from a folder or a hub id, without running code from there.

    A completion ends at EOS, as in the released code. LLaDA's end of turn (`<|eot_id|>`) is a special token,
    which does not end a completion and is left out of texts.

    Args:
        path: Folder or hub id of the model.
        revision: Branch, tag or commit of the hub id; None for its main branch.
        mask_token: The mask, if the tokenizer declares none, like that of LLaDA.
        eos_token: The token that ends a completion, if the tokenizer declares none.
        pad_token: The padding, if the tokenizer declares none; None for EOS.
        chat: Give the chat template of LLaDA to a tokenizer that has the tokens for it and no template.

    Raises:
        InputError: if nothing can be loaded, or a token is not in the vocabulary.
    """
    where = f"model.path={path}" + ("" if revision is None else f" model.revision={revision}")
    folder = fetch(path, revision, TOKENIZER)
    verbosity = transformers_logging.get_verbosity()
    # transformers would warn about the config.json of a model that it does not know
    transformers_logging.set_verbosity_error()
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, padding_side="left"
        )
    except Exception as error:  # broken files raise all kinds, even panics of the Rust code
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(
            f"{where}: its tokenizer can't be loaded ({reason}); {folder} needs tokenizer.json and "
            "tokenizer_config.json"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    vocabulary = tokenizer.get_vocab()
    chosen = {"mask_token": mask_token, "eos_token": eos_token, "pad_token": pad_token}
    for name, token in chosen.items():
        if getattr(tokenizer, name) is None:
            token = tokenizer.eos_token if token is None and name == "pad_token" else token
            if token is None:
                raise InputError(
                    f"{where}: its tokenizer declares no {name}; give it one of its tokens: "
                    f"model.tokenizer.{name}=..."
                )
            if token not in vocabulary:
                raise InputError(
                    f"{where}: model.tokenizer.{name}={token} is not one of the {len(vocabulary)} tokens of "
                    "its tokenizer; give one of them"
                )
            setattr(tokenizer, name, token)
    if chat and tokenizer.chat_template is None and {HEADER, HEADER_END, END_OF_TURN} <= vocabulary.keys():
        tokenizer.chat_template = LLADA_CHAT
    return tokenizer
