"""A small `tiktoken.model` of our own and the plainest encoder for it: pattern by `regex`, merges by rank, no library."""

from __future__ import annotations

import functools
from collections import Counter

import regex

from tidelock.tokens.kimi import PATTERN, SPECIALS, KimiTokenizer

CORPUS = (
    "The quick brown fox isn't here; they've gone to Zürich and back. 12345 x 678 = 8381310\n\n  def f(x):\n\treturn x\n"
    '{"key":"value","n":1} functions.lookup:0 ## Return of functions.lookup:0\n<|open|>message role="user"<|sep|>'
    "月之暗面的模型会调用工具。 Ёлка naïve 한국어 हिन्दी العربية ｆｕｌｌ 🙂🙂"
)


def merge(parts: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    out: list[bytes] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


def split(text: str) -> list[list[bytes]]:
    return [[bytes([b]) for b in piece.encode()] for piece in regex.findall(PATTERN, text, regex.V1)]


@functools.cache
def ranks(size: int = 420) -> dict[bytes, int]:
    out, words = {bytes([b]): b for b in range(256)}, split(CORPUS * 2)
    while len(out) < size:
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        out[best[0] + best[1]] = len(out)
        words = [merge(word, best) for word in words]
    return out


def naive_encode(text: str, rank: dict[bytes, int]) -> list[int]:
    ids = []
    for parts in split(text):
        while len(parts) > 1:
            best = min(zip(parts, parts[1:]), key=lambda pair: rank.get(pair[0] + pair[1], len(rank)))
            if best[0] + best[1] not in rank:
                break
            parts = merge(parts, best)
        ids += [rank[p] for p in parts]
    return ids


@functools.cache
def tiny_kimi() -> KimiTokenizer:
    """K2's special ids, and XTML's in four reserved places, as a K3 directory's configuration would name them."""
    base = len(ranks())
    markers = dict(enumerate(("<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>"), base + 40))
    return KimiTokenizer(ranks(), {**{base + place: name for place, name in SPECIALS.items()}, **markers})
