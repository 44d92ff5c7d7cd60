"""The tokenizer of the published Kimi models: a `tiktoken.model` file, K2's pattern, 256 special ids behind it.

The encoding itself is the `tiktoken` library's, which never hears of the special tokens. Which special id has which name
stands in the checkpoint's `tokenizer_config.json`; without that file it is what the model reference gives for K2.

Source: model reference, section 1.9.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import tiktoken

from .errors import UserError
from .tokenizer import CACHED_CHARS, Vocabulary

MODEL_FILE, CONFIG_FILE = "tiktoken.model", "tokenizer_config.json"
RESERVED = 256
# By place behind the vocabulary, whose published size is 163,584. The places of `<think>` and `</think>` are not in the
# reference and unverified; like all of these they count only where no configuration lies beside the file.
SPECIALS = {
    0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>", 10: "<|im_system|>",
    11: "<|tool_calls_section_begin|>", 12: "<|tool_calls_section_end|>", 13: "<|tool_call_begin|>",
    14: "<|tool_call_argument_begin|>", 15: "<|tool_call_end|>", 17: "<|im_middle|>", 21: "<|media_pad|>",
    22: "<think>", 23: "</think>",
}  # fmt: skip

# Rust's regex dialect: `&&` is the intersection of two classes.
PATTERN = "|".join([
    r"[\p{Han}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
])  # fmt: skip

MAX_CHARS = 400_000  # encoded at a time
MAX_RUN = 25_000  # characters of text, or of space, without the other between them
RUNS = re.compile(r"\s+|\S+")


class KimiTokenizer(Vocabulary):
    """Byte-level BPE by rank. Any text round-trips: decode(encode(s)) == s."""

    def __init__(self, ranks: Mapping[bytes, int], specials: Mapping[int, str] | None = None) -> None:
        """`ranks`: id of each token, 0 to n-1, every single byte among them. `specials`: names by id, n to n+255; ids
        without one are called `<|reserved_token_{id}|>`. None gives K2's."""
        base = len(ranks)
        if specials is None:
            specials = {base + place: name for place, name in SPECIALS.items()}
        names = [specials.get(i, f"<|reserved_token_{i}|>") for i in range(base, base + RESERVED)]
        super().__init__(base, names)
        self._library = tiktoken.Encoding("kimi", pat_str=PATTERN, mergeable_ranks=dict(ranks), special_tokens={})
        self._bytes = sorted(ranks, key=ranks.__getitem__)
        self.document_end = self._special.get("[EOS]", base + 1)
        content = _model_text(self._bytes) + json.dumps(names).encode()
        self.identity = hashlib.blake2b(content, digest_size=8).hexdigest()
        self._encode_cached = functools.lru_cache(maxsize=16384)(self._encode)

    def encode(self, text: str) -> list[int]:
        return list(self._encode_cached(text) if len(text) <= CACHED_CHARS else self._encode(text))

    def _encode(self, text: str) -> list[int]:
        return [i for piece in pieces(text) for i in self._library.encode_ordinary(piece)]

    def _base_bytes(self, token: int) -> bytes:
        return self._bytes[token]

    def save(self, directory: str | Path) -> None:
        """Writes `tiktoken.model` and the names of the special ids, as Hugging Face checkpoints hold them."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        named = {i: name for i, name in enumerate(self.specials, self.base) if name != f"<|reserved_token_{i}|>"}
        decoder = {str(i): {"content": name, "special": True} for i, name in named.items()}
        config = json.dumps({"added_tokens_decoder": decoder}, indent=1, ensure_ascii=False).encode()
        for name, data in ((CONFIG_FILE, config), (MODEL_FILE, _model_text(self._bytes))):
            scratch = directory / f".{name}.tmp"
            scratch.write_bytes(data)
            os.replace(scratch, directory / name)

    @staticmethod
    def load(directory: str | Path) -> KimiTokenizer:
        """Raises UserError, naming file and line, when something is missing or broken."""
        directory = Path(directory)
        ranks = read_ranks(directory / MODEL_FILE)
        config = directory / CONFIG_FILE
        return KimiTokenizer(ranks, read_specials(config, len(ranks)) if config.exists() else None)


def pieces(text: str) -> Iterator[str]:
    """`text` cut as the published tokenizer cuts it before the pattern sees it: the library's time and stack grow with
    the longest match, and a megabyte without a space is one."""
    for at in range(0, len(text), MAX_CHARS):
        block, start = text[at : at + MAX_CHARS], 0
        for run in RUNS.finditer(block) if len(block) > MAX_RUN else ():
            for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
                yield block[start:cut]
                start = cut
        yield block[start:]


def read_ranks(file: Path) -> dict[bytes, int]:
    """Each token's bytes and rank from a file of `base64 rank` lines. Raises UserError naming file and line."""
    if not file.exists():
        raise UserError(f"no tokenizer: {file} does not exist")
    ranks: dict[bytes, int] = {}
    lines: dict[int, int] = {}  # of each rank
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            text, rank = line.split()
            token, rank = base64.b64decode(text, validate=True), int(rank)
        except ValueError:
            raise UserError(f"corrupt tokenizer: {file}, line {number} is not a base64 token and its rank") from None
        if token in ranks or rank in lines:
            earlier = lines[ranks[token] if token in ranks else rank]
            raise UserError(f"corrupt tokenizer: {file}, line {number} repeats the token or rank of line {earlier}")
        ranks[token], lines[rank] = rank, number
    for rank, number in lines.items():
        if not 0 <= rank < len(ranks):
            raise UserError(f"corrupt tokenizer: {file}, line {number} has rank {rank} in a file of {len(ranks)} tokens")
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise UserError(f"corrupt tokenizer: {file}, no line holds the single byte {missing[0]:#04x}; is the file cut?")
    return ranks


def read_specials(file: Path, base: int) -> dict[int, str]:
    """Names of special ids from `added_tokens_decoder`. Raises UserError naming the file and the entry."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8")).get("added_tokens_decoder", {})
        names = {int(i): entry["content"] for i, entry in entries.items()}
        unique = len(set(names.values())) == len(names) and all(isinstance(name, str) for name in names.values())
    except json.JSONDecodeError as e:
        raise UserError(f"corrupt tokenizer: {file}, line {e.lineno}: {e.msg}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        unique = False
    if not unique:
        raise UserError(f"corrupt tokenizer: {file}: added_tokens_decoder must map ids to {{content: a name of its own}}")
    for i, name in names.items():
        if not base <= i < base + RESERVED:
            raise UserError(f"corrupt tokenizer: {file}: {name!r} has id {i}, outside {base} to {base + RESERVED - 1}")
    return names or {base + place: name for place, name in SPECIALS.items()}


def _model_text(tokens: list[bytes]) -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))
