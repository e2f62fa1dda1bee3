"""Tokenizers: bytes are written and read back, LLaDA's form of chats, what published folders leave out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spg.core.errors import InputError
from spg.models.llada import LLaDA, LLaDAConfig
from spg.models.policy import Policy
from spg.models.tokenizer import EOS, FORM, LLADA_CHAT, LLADA_MASK, byte_tokenizer, pretrained
from spg.tasks.gsm8k import GSM8K
from spg.tasks.question_answering import format_completion

BYTES = byte_tokenizer()


def saved(folder: Path, *without: str) -> Path:
    """Write the byte tokenizer's files as LLaDA's are, without some of its settings."""
    byte_tokenizer().save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    told = json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps({key: value for key, value in told.items() if key not in without}))
    if "chat_template" in without:
        (folder / "chat_template.jinja").unlink()
    # code of its own, which is not asked for
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llada", "auto_map": {"AutoConfig": "x.Y"}})
    )
    return folder


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text() | st.sampled_from((*FORM, *(tag.strip() for tag in FORM), "\n"))).map("".join))
def test_every_text_is_read_back(text: str) -> None:
    ids = BYTES.encode(text, add_special_tokens=False)
    assert len(ids) <= len(text.encode())
    assert len(ids) == len(text.encode()) or any(tag in text for tag in FORM)
    assert BYTES.decode(ids, skip_special_tokens=True) == text


def test_the_published_form_is_three_tokens_that_stay_in_texts() -> None:
    text = format_completion("", "4")
    ids = BYTES.encode(text, add_special_tokens=False)
    assert BYTES.convert_ids_to_tokens(ids) == [FORM[0], FORM[1], *r"\boxed{4}", FORM[2]]
    assert BYTES.decode(ids, skip_special_tokens=True) == text
    parts = GSM8K().reward({"question": "2+2?", "answer": "#### 4"}, text)
    assert parts == {"xml": 0.5, "soft_format": 0.5, "strict_format": 0.5, "integer": 0.5, "correctness": 2.0}


def test_every_byte_is_a_token() -> None:
    assert len(set(BYTES.encode("".join(map(chr, range(128))), add_special_tokens=False))) == 128
    assert len(BYTES) == 256 + 6 + len(FORM)
    assert BYTES.pad_token_id == BYTES.eos_token_id != BYTES.mask_token_id


def test_a_chat_has_the_published_form() -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " What is 1+1?\n"}]
    expected = (
        "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is 1+1?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    for prompt in (True, False):  # an answer is opened always
        written = BYTES.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
        assert written == expected
    network = LLaDA(LLaDAConfig(16, 1, 2, 2, 16, vocab_size=265, embedding_size=272))
    ids = Policy(network, BYTES).encode(chat)
    assert BYTES.decode(ids) == expected
    assert sum(i >= 256 for i in ids) == 9, "special tokens are one token each"


def test_end_of_turn_is_left_out_of_texts_and_ends_nothing() -> None:
    turn = BYTES.convert_tokens_to_ids("<|eot_id|>")
    ids = [*BYTES.encode("4", add_special_tokens=False), turn, *BYTES.encode("2", add_special_tokens=False)]
    assert turn != BYTES.eos_token_id
    assert BYTES.decode(ids, skip_special_tokens=True) == "42"


def test_a_published_folder_gets_the_mask_that_it_does_not_declare(tmp_path: Path) -> None:
    folder = saved(tmp_path, "mask_token", "pad_token", "padding_side")
    tokenizer = pretrained(str(folder), mask_token=LLADA_MASK)
    assert tokenizer.mask_token_id == BYTES.mask_token_id
    assert (tokenizer.eos_token, tokenizer.pad_token) == (EOS, EOS)
    assert tokenizer.padding_side == "left"
    with pytest.raises(InputError, match=r"declares no mask_token; .*model\.tokenizer\.mask_token="):
        pretrained(str(folder))
    with pytest.raises(InputError, match=r"model\.tokenizer\.mask_token=<mask> is not one of the 265 tokens"):
        pretrained(str(folder), mask_token="<mask>")


def test_what_the_tokenizer_declares_holds(tmp_path: Path) -> None:
    tokenizer = pretrained(str(saved(tmp_path)), mask_token="<mask>", eos_token="<eos>")
    assert (tokenizer.mask_token, tokenizer.eos_token) == (LLADA_MASK, EOS)


def test_the_form_of_chats_is_the_folders_own_where_it_has_one(tmp_path: Path) -> None:
    folder = saved(tmp_path, "chat_template")
    assert pretrained(str(folder)).chat_template == LLADA_CHAT
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    tokenizer = pretrained(str(folder))
    chat = [{"role": "user", "content": "a"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == "a!"


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"its tokenizer can't be loaded .* needs tokenizer\.json"):
        pretrained(str(tmp_path))
    folder = saved(tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="its tokenizer can't be loaded"):
        pretrained(str(folder))
    with pytest.raises(InputError, match="is not a folder, nor the name of a model"):
        pretrained(str(tmp_path / "none"))
