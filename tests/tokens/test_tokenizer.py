"""Tokenizers: text comes back, and no text can say a special token."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidelock.tokens.errors import UserError
from tidelock.tokens.tokenizer import SPECIALS, BPETokenizer, ByteTokenizer

BPE = BPETokenizer.train(["def f(x):\n    return x + 1  # the quick brown fox\n" + "".join(SPECIALS)] * 30, 500)
both = pytest.mark.parametrize("tokenizer", [BPE, ByteTokenizer()], ids=["bpe", "bytes"])
any_text = st.text(st.characters(exclude_categories=["Cs"]))


@both
@settings(max_examples=100, deadline=None)
@given(text=any_text)
def test_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@both
@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.one_of(st.sampled_from(SPECIALS), any_text), max_size=5))
def test_no_text_encodes_to_a_special_token(tokenizer, parts):
    """Not even text that spells one, although it was in the training text."""
    text = "".join(parts)
    ids = tokenizer.encode(text)
    assert not any(tokenizer.is_special(i) for i in ids) and tokenizer.decode(ids) == text


@both
def test_special_tokens_lie_behind_the_vocabulary_and_decode_to_their_marker(tokenizer):
    ids = [tokenizer.special(s) for s in SPECIALS]
    assert sorted(ids) == list(range(tokenizer.base, tokenizer.vocab_size))
    assert tokenizer.decode(ids) == "".join(SPECIALS)


def test_digits_stand_alone_and_a_tag_header_can_be_one_token():
    assert len(BPE.encode("2468")) == 4
    trained = BPETokenizer.train(['message role="assistant"'] * 20, 500)
    assert len(trained.encode('message role="assistant"')) == 1


def test_saved_and_loaded_is_the_same(tmp_path):
    BPE.save(tmp_path)
    again = BPETokenizer.load(tmp_path)
    text = "def quick(fox): return 17"
    assert again.encode(text) == BPE.encode(text) and again.identity == BPE.identity


def test_a_missing_or_damaged_file_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        BPETokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="corrupt tokenizer"):
        BPETokenizer.load(tmp_path)
