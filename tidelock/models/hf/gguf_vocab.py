"""The vocabulary section of a GGUF file, from the tokenizer files beside a checkpoint.

Ids are what matters between us and llama.cpp: every id has its bytes, so what it samples can be read. Its splitter for
our own tokenizer is the nearest one it has, so text that llama.cpp encodes itself may come out in other pieces.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tidelock.tokens.errors import UserError
from tidelock.tokens.kimi import MODEL_FILE, KimiTokenizer, read_ranks
from tidelock.tokens.tokenizer import JSON_FILE, SPECIALS, byte_alphabet

NORMAL, CONTROL, UNUSED = 1, 3, 5  # llama.cpp's token types
END_OF_TURN = "<|end_of_msg|>"


@dataclass(frozen=True)
class Vocabulary:
    """`tokens` in GPT-2's printable bytes, by id; `merges` as "left right", most important first."""

    pre: str  # llama.cpp's name of the splitter
    tokens: list[str]
    types: list[int]
    merges: list[str]
    eos: int

    def write(self, writer) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        writer.add_eos_token_id(self.eos)
        writer.add_add_bos_token(False)


def read_vocabulary(directory: str | Path | None, size: int) -> Vocabulary:
    """The vocabulary of `size` ids in `directory`: a byte-level `tokenizer.json`, or K2's `tiktoken.model`.

    Without either (or without a directory): one id per byte and our special tokens, as `ByteTokenizer` has them.
    Raises UserError when the files cannot be read or hold more ids than the model.
    """
    directory = None if directory is None else Path(directory)
    if directory is not None and (directory / MODEL_FILE).exists():
        pre, base, merges, named = _tiktoken(directory)
    elif directory is not None and (directory / JSON_FILE).exists():
        pre, base, merges, named = _library_file(directory / JSON_FILE)
    else:
        # only "kimi-k2" may come without merges
        pre, base, merges = "kimi-k2", [byte_alphabet()[b] for b in range(256)], []
        named = {len(base) + i: name for i, name in enumerate(SPECIALS)}
        if size < len(base) + len(SPECIALS):
            base, named = base[:size], {}
    special = dict(enumerate(base)) | named
    if max(special) >= size:
        raise UserError(f"{directory} holds {max(special) + 1} ids but the model's vocabulary is {size}")
    tokens = [special.get(i, f"[PAD{i}]") for i in range(size)]
    types = [CONTROL if i in named else NORMAL if i < len(base) else UNUSED for i in range(size)]
    return Vocabulary(pre, tokens, types, merges, _end(directory, named, size))


Found = tuple[str, list[str], list[str], dict[int, str]]  # splitter, base tokens, merges, special tokens by id


def _library_file(file: Path) -> Found:
    try:
        data = json.loads(file.read_text())
        model = data["model"]
        base = [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        named = {added["id"]: added["content"] for added in data.get("added_tokens") or []}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{file} is not a byte-level BPE tokenizer ({e!r})") from None
    if not named:  # our own file keeps special tokens out of the library's reach
        named = {len(base) + i: name for i, name in enumerate(SPECIALS)}
    return "qwen2", base, merges, named  # like ours it cuts words with a leading space and digits one by one


def _tiktoken(directory: Path) -> Found:
    tokenizer, ranks, alphabet = KimiTokenizer.load(directory), read_ranks(directory / MODEL_FILE), byte_alphabet()
    named = {i: name for i, name in enumerate(tokenizer.specials, tokenizer.base) if "reserved_token" not in name}

    def printable(token: bytes) -> str:
        return "".join(alphabet[b] for b in token)

    ordered = sorted(ranks, key=ranks.__getitem__)
    pairs = (last_merge(token, ranks) for token in ordered if len(token) > 1)
    merges = [f"{printable(a)} {printable(b)}" for a, b in filter(None, pairs)]
    return "kimi-k2", [printable(token) for token in ordered], merges, named


def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The pair whose merge makes `token`: byte-pair encoding with only the ranks below its own. None: no pair does."""
    parts, limit = [bytes([b]) for b in token], ranks[token]
    while len(parts) > 2:
        rank, at = min((ranks.get(a + b, limit), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        if rank >= limit:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _end(directory: Path | None, named: dict[int, str], size: int) -> int:
    """The id that ends a turn: what the generation config says, else our end of message, else the last id."""
    for name in ("generation_config.json", "config.json"):
        file = None if directory is None else directory / name
        if file is not None and file.exists():
            stop = json.loads(file.read_text()).get("eos_token_id")
            stop = stop[0] if isinstance(stop, list) and stop else stop
            if isinstance(stop, int):
                return stop
    return next((i for i, name in named.items() if name == END_OF_TURN), size - 1)
