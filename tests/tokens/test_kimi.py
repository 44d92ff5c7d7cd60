"""The Kimi tokenizer: K2's pattern and ids, text in and out, and one clear error for every broken file."""

import base64
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_kimi import naive_encode, ranks, tiny_kimi

from tidelock.tokens.errors import UserError
from tidelock.tokens.kimi import MAX_RUN, SPECIALS, KimiTokenizer, pieces
from tidelock.tokens.tokenizer import BPETokenizer, load_tokenizer

T = tiny_kimi()
NAMES = [name for name in T.specials if "reserved" not in name]
# Python's tables and Rust's may be of different Unicode versions: characters both know.
assigned = st.characters(exclude_categories=["Cs", "Cn", "Co"])
spice = st.sampled_from(["'S", "'LL", "'ſ", "\r\n", " \n ", "\u3000", "漢", "的A", "aB", "Ab", "ǅ", "é", "1234", "🙂", "  ", "\x85"])
texts = st.lists(st.one_of(spice, st.text(assigned, max_size=6)), max_size=12).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_ids_are_those_of_the_plainest_encoder(text):
    assert T.encode(text) == naive_encode(text, ranks())


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.one_of(st.sampled_from(NAMES), st.text(st.characters(exclude_categories=["Cs"]))), max_size=6))
def test_any_text_comes_back_and_none_says_a_special_id(parts):
    text = "".join(parts)
    ids = T.encode(text)
    assert T.decode(ids) == text and not any(T.is_special(i) for i in ids)


@pytest.mark.parametrize(("text", "words"), [
    ("HelloWorld's", ["Hello", "World's"]),
    ("ABCdef", ["ABCdef"]),
    ("月之暗面AI模型", ["月之暗面", "AI", "模型"]),
    ("A漢a b漢B é漢é", ["A", "漢", "a", " b", "漢", "B", " é", "漢", "é"]),
    ("12345", ["123", "45"]),
    ("a  b", ["a", " ", " b"]),
    ("x;\n\ny \n", ["x", ";\n\n", "y", " \n"]),
    ("(isn't)", ["(isn't", ")"]),
])  # fmt: skip
def test_the_pattern_splits_as_k2s(text, words):
    """With every stretch of the text a token, each word becomes one id."""
    data = text.encode()
    stretches = [data[i:j] for i in range(len(data)) for j in range(i + 2, len(data) + 1)]
    t = KimiTokenizer({s: i for i, s in enumerate(dict.fromkeys([*(bytes([b]) for b in range(256)), *stretches]))})
    assert [t.decode([i]) for i in t.encode(text)] == words


def test_special_ids_are_k2s_behind_a_vocabulary_of_its_size():
    token = lambda i: bytes([i]) if i < 256 else b"\xff" + i.to_bytes(3, "big")  # noqa: E731
    t = KimiTokenizer({token(i): i for i in range(163_584)})
    assert t.vocab_size == 163_840
    expected = {
        "[BOS]": 163584, "[EOS]": 163585, "<|im_end|>": 163586, "<|im_user|>": 163587, "<|im_assistant|>": 163588,
        "<|im_system|>": 163594, "<|tool_calls_section_begin|>": 163595, "<|tool_calls_section_end|>": 163596,
        "<|tool_call_begin|>": 163597, "<|tool_call_argument_begin|>": 163598, "<|tool_call_end|>": 163599,
        "<|im_middle|>": 163601, "<|media_pad|>": 163605, "<|reserved_token_163839|>": 163839,
    }  # fmt: skip
    assert {name: t.special(name) for name in expected} == expected
    assert t.decode([163586, 163700]) == "<|im_end|><|reserved_token_163700|>" and t.document_end == 163585


def test_long_texts_are_cut_where_the_published_tokenizer_cuts():
    """At 400,000 characters, and after every 25,000 of one kind."""
    lengths = lambda text: [len(p) for p in pieces(text)]  # noqa: E731
    assert lengths("ab " * 9) == [27] and lengths("") == []
    assert lengths("x" * 60_000) == [25_000, 25_000, 10_000]
    assert lengths("x" * 25_000 + " y") == [25_002]
    assert lengths("ab" + " " * 25_001 + "c") == [25_002, 2]
    assert lengths("ab " * 150_000) == [400_000, 50_000]


@pytest.mark.parametrize("text", ["x" * 500_000, " " * 500_000, "月" * 100_000, "!" * 100_000, "\n" * 100_000, "ab " * 300_000])
def test_runs_without_end_come_back(text):
    assert len(text) > MAX_RUN and T.decode(T.encode(text)) == text


def test_lone_surrogates_become_replacement_characters():
    assert T.decode(T.encode("a\ud800b")) == "a\ufffdb"


def test_saved_and_loaded_is_the_same_and_a_directory_says_which_tokenizer_it_holds(tmp_path):
    T.save(tmp_path / "kimi")
    again = load_tokenizer(tmp_path / "kimi")
    assert isinstance(again, KimiTokenizer) and again.identity == T.identity and again.specials == T.specials
    assert again.encode("The quick 月之暗面 12345") == T.encode("The quick 月之暗面 12345")
    BPETokenizer.train(["some text"] * 9, 300).save(tmp_path / "ours")
    assert isinstance(load_tokenizer(tmp_path / "ours"), BPETokenizer)
    with pytest.raises(UserError, match="neither tiktoken.model nor tokenizer.json"):
        load_tokenizer(tmp_path)


def test_without_a_configuration_the_names_are_k2s_and_other_names_are_another_tokenizer(tmp_path):
    T.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    bare = load_tokenizer(tmp_path)
    assert [n for n in bare.specials if "reserved" not in n] == list(SPECIALS.values())
    assert bare.identity != T.identity
    with pytest.raises(UserError, match=r"no special token '<\|open\|>'"):
        bare.special("<|open|>")


def line(token, rank):
    return base64.b64encode(token) + b" %d" % rank


BYTES = [line(bytes([b]), b) for b in range(256)]


@pytest.mark.parametrize(("lines", "message"), [
    ([*BYTES, b"####  256"], r"tiktoken\.model, line 257 is not a base64 token"),
    ([*BYTES, b"AAAA"], "line 257 is not"),
    ([*BYTES, b"AAAA x"], "line 257 is not"),
    ([*BYTES, line(b"a", 256)], "line 257 repeats the token or rank of line 98"),
    ([*BYTES, line(b"ab", 97)], "line 257 repeats the token or rank of line 98"),
    ([*BYTES, line(b"ab", 300)], "line 257 has rank 300 in a file of 257"),
    ([*BYTES[:-1], line(b"ab", -1)], "line 256 has rank -1"),
    ([*BYTES[:-1], line(b"ab", 255)], "single byte 0xff"),
    ([], "single byte 0x00"),
    ([b"\xff\xfe\x00"], "line 1 is not"),
])  # fmt: skip
def test_a_broken_model_file_is_one_error_that_names_its_line(tmp_path, lines, message):
    (tmp_path / "tiktoken.model").write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("config", "message"), [
    ("{\n oops", "tokenizer_config.json, line 2"),
    ("[]", "must map ids"),
    ('{"added_tokens_decoder": {"420": "x"}}', "must map ids"),
    ('{"added_tokens_decoder": {"420": {"content": []}}}', "must map ids"),
    ('{"added_tokens_decoder": {"x": {"content": "a"}}}', "must map ids"),
    ('{"added_tokens_decoder": {"420": {"content": "a"}, "421": {"content": "a"}}}', "a name of its own"),
    ('{"added_tokens_decoder": {"163584": {"content": "[BOS]"}}}', "id 163584, outside 420 to 675"),
])  # fmt: skip
def test_a_broken_configuration_is_one_error_that_names_the_file(tmp_path, config, message):
    T.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_other_fields_of_a_published_configuration_do_not_matter(tmp_path):
    T.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TikTokenTokenizer", **config}))
    assert load_tokenizer(tmp_path).identity == T.identity
