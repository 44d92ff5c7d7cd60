"""Byte-level BPE over a well-kept library, with special tokens kept out of its reach.

The library only ever sees plain text. Special tokens are ids appended behind its vocabulary by our wrapper, so no text
a user can type encodes to one. `ByteTokenizer` is the same interface without training: one id per byte. The published
Kimi models' tokenizer is in `kimi`; `load_tokenizer` takes whichever a directory holds.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from .errors import UserError

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one short text at a time: threads of the library's own only cost
JSON_FILE = "tokenizer.json"
CACHED_CHARS = 2048  # a tool declaration fits; longer texts are documents, seldom seen twice, and would fill the memory
SPECIALS = (
    "<|eod|>",  # end of a document
    # XTML (K3)
    "<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>",
    # ChatML with tool sections (K2)
    "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "<|im_end|>",
    "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>",
    "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>",
    "<think>", "</think>",
)  # fmt: skip

# Words may lead with a space, digits stand alone (numbers are copied digit by digit), and a tag header such as
# `message role="assistant"` is one piece, so that a frequent one becomes one token.
PIECES = r'[a-z]+(?: [a-z]+="[^"<>]*")+| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+'


class Vocabulary:
    """Base of the tokenizers: ids of text up to `base`, then the special tokens.

    document_end: the id that ends a document in pretraining text.
    """

    identity: str  # equal for tokenizers that give equal ids for equal texts
    document_end: int

    def __init__(self, base: int, specials: Sequence[str]) -> None:
        self.base = base
        self.specials = tuple(specials)
        self.vocab_size = base + len(self.specials)
        self._special = {name: base + i for i, name in enumerate(self.specials)}

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; never a special id, whatever the text says. Lone surrogates become U+FFFD."""
        raise NotImplementedError

    def save(self, directory: str | Path) -> None:
        raise NotImplementedError

    def special(self, name: str) -> int:
        """Raises UserError when there is no such token."""
        if name not in self._special:
            raise UserError(f"this tokenizer has no special token {name!r}; take the template that belongs to it")
        return self._special[name]

    def is_special(self, token: int) -> bool:
        return token >= self.base

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.token_bytes(i) for i in ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special tokens appear as their marker, broken UTF-8 as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        if token >= self.vocab_size or token < 0:
            raise ValueError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
        if token >= self.base:
            return self.specials[token - self.base].encode()
        return self._base_bytes(token)

    def _base_bytes(self, token: int) -> bytes:
        raise NotImplementedError

    @functools.cached_property
    def longest(self) -> int:
        """Bytes of the longest token of text: a text has at least its bytes over this many tokens."""
        return max(len(self._base_bytes(token)) for token in range(self.base))


class BPETokenizer(Vocabulary):
    """Byte-level BPE (the `tokenizers` library). Any text round-trips: decode(encode(s)) == s."""

    def __init__(self, library: Tokenizer) -> None:
        super().__init__(library.get_vocab_size(), SPECIALS)
        self.document_end = self.special("<|eod|>")
        self._library = library
        # GPT-2's printable stand-ins for bytes, undone once for the whole vocabulary.
        stand_in = {c: b for b, c in byte_alphabet().items()}
        self._bytes = [bytes(stand_in[c] for c in library.id_to_token(i)) for i in range(self.base)]
        self.identity = hashlib.blake2b(library.to_str().encode(), digest_size=8).hexdigest()
        self._encode_cached = functools.lru_cache(maxsize=16384)(self._encode)

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
        """Learn merges until `vocab_size` ids, special tokens included (fewer when the texts have no more to merge).

        Raises UserError when `vocab_size` does not even hold the bytes and the special tokens.
        """
        if vocab_size < 256 + len(SPECIALS):
            raise UserError(f"a vocabulary of {vocab_size} is too small; give at least {256 + len(SPECIALS)}")
        library = Tokenizer(models.BPE())
        library.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])
        library.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(SPECIALS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        library.train_from_iterator(texts, trainer)
        return BPETokenizer(library)

    def encode(self, text: str) -> list[int]:
        return list(self._encode_cached(text) if len(text) <= CACHED_CHARS else self._encode(text))

    def _encode(self, text: str) -> list[int]:
        try:
            return self._library.encode_batch_fast([text])[0].ids  # "fast": without the offsets, which nobody reads
        except (UnicodeError, TypeError):  # what the library raises for surrogates depends on its version
            return self._library.encode_batch_fast([_well_formed(text)])[0].ids

    def _base_bytes(self, token: int) -> bytes:
        return self._bytes[token]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        if ids and min(ids) >= 0 and max(ids) < self.base:
            return b"".join([self._bytes[i] for i in ids])
        return super().decode_bytes(ids)

    def save(self, directory: str | Path) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        scratch = directory / ".tokenizer.json.tmp"
        self._library.save(str(scratch))
        scratch.replace(directory / JSON_FILE)

    @staticmethod
    def load(directory: str | Path) -> BPETokenizer:
        """Raises UserError when there is no tokenizer or it cannot be read."""
        file = Path(directory) / JSON_FILE
        if not file.exists():
            raise UserError(f"no tokenizer: {file} does not exist")
        try:
            data = json.loads(file.read_text())
            if [added["content"] for added in data.get("added_tokens") or []] == list(SPECIALS):
                data["added_tokens"] = []  # an export of ours names them to the library; text must not spell them here
            return BPETokenizer(Tokenizer.from_str(json.dumps(data)))
        except Exception as e:  # the library raises bare Exception
            raise UserError(f"corrupt tokenizer: {file} ({e})") from None


class ByteTokenizer(Vocabulary):
    """One id per byte. For endpoints that speak text, where ids are only our own bookkeeping."""

    identity = "bytes"

    def __init__(self) -> None:
        super().__init__(256, SPECIALS)
        self.document_end = self.special("<|eod|>")

    def encode(self, text: str) -> list[int]:
        return list(_well_formed(text).encode())

    def _base_bytes(self, token: int) -> bytes:
        return bytes([token])


def load_tokenizer(directory: str | Path) -> Vocabulary:
    """Whichever tokenizer lies in `directory`: a `tiktoken.model` (Kimi) before a `tokenizer.json` (ours).

    Raises UserError when there is none or it cannot be read.
    """
    from .kimi import MODEL_FILE, KimiTokenizer

    directory = Path(directory)
    if (directory / MODEL_FILE).exists():
        return KimiTokenizer.load(directory)
    if (directory / JSON_FILE).exists():
        return BPETokenizer.load(directory)
    raise UserError(f"no tokenizer: {directory} holds neither {MODEL_FILE} nor {JSON_FILE}")


def _well_formed(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def byte_alphabet() -> dict[int, str]:
    """The printable character that byte-level BPE writes for each byte (GPT-2)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}
