"""What sampling costs at a vocabulary of 163,840: milliseconds for a batch, per option; grammars and their masks.

    python -m benchmarks.sampling [--batch 32]

One thread, best of five. "flat" logits have a nucleus of tens of thousands of ids, "peaked" ones of tens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from tidelock.engine.grammar import Grammars
from tidelock.engine.penalties import Seen
from tidelock.engine.sampling import Ask, sample
from tidelock.tokens.policy import Constraint, SamplingParams
from tidelock.tokens.tokenizer import SPECIALS, ByteTokenizer, Vocabulary

VOCAB = 163_840
OPTIONS = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {},
    "temperature 0.7": {"temperature": 0.7},
    "top-p 0.95": {"top_p": 0.95},
    "top-k 50": {"top_k": 50},
    "min-p 0.05": {"min_p": 0.05},
    "top-k, top-p, min-p": {"top_k": 50, "top_p": 0.9, "min_p": 0.05},
    "penalties": {"presence_penalty": 0.5, "repetition_penalty": 1.1},
    "20 top log-probs": {"top_logprobs": 20},
}
SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["name", "tags", "n"],
    "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {"type": "string"}}, "n": {"type": "integer"}},
}  # fmt: skip


class Synthetic(ByteTokenizer):
    """As many tokens as a large vocabulary has: the bytes, then made-up words, half of them after a space."""

    def __init__(self) -> None:
        rng, letters = random.Random(0), "etaoinshrdlucmfwypvbgkjqxz"
        words: dict[bytes, None] = {bytes([b]): None for b in range(256)}
        while len(words) < VOCAB - len(SPECIALS):
            word = "".join(rng.choice(letters[: rng.randint(4, 26)]) for _ in range(rng.randint(2, 9)))
            words[(" " * rng.randint(0, 1) + word).encode()] = None
        self._words = list(words)
        Vocabulary.__init__(self, len(self._words), SPECIALS)
        self.document_end = self.special("<|eod|>")

    def _base_bytes(self, token: int) -> bytes:
        return self._words[token]


def best(work, n: int = 5) -> float:
    times = []
    for _ in range(n):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return 1e3 * min(times)


def sampling(batch: int) -> None:
    rng = torch.Generator().manual_seed(0)
    flat = torch.randn(batch, VOCAB, generator=rng) * 3
    peaked = flat.clone()
    peaked[:, :20] += 18
    print(f"{'ms for ' + str(batch) + ' rows':28} {'flat':>8} {'peaked':>8}")
    for name, options in OPTIONS.items():
        params = SamplingParams(**options)
        asks = [Ask(params, i, 9, Seen(range(i, 2000 + i)) if "penalt" in name else None) for i in range(batch)]
        print(f"{name:28} " + " ".join(f"{best(lambda x=x: sample(x, asks)):8.1f}" for x in (flat, peaked)))
    allowed = np.random.default_rng(0).random(VOCAB) < 0.9
    asks = [Ask(SamplingParams(), i, 9, None, allowed) for i in range(batch)]
    print(f"{'a constraint, 90 % allowed':28} " + " ".join(f"{best(lambda x=x: sample(x, asks)):8.1f}" for x in (flat, peaked)))


def grammars() -> None:
    tokenizer = Synthetic()
    found = Grammars(tokenizer, VOCAB)
    constraint = Constraint("json_schema", json.dumps(SCHEMA))

    def fresh():
        return asyncio.run(found.matcher(constraint))

    print(f"\ntokenizer {best(lambda: asyncio.run(found.matcher(Constraint('regex', 'a'))), 1):.0f} ms once, "
          f"then a schema {best(fresh, 1):.1f} ms, again {best(fresh):.2f} ms")  # fmt: skip
    rng, masks, beside = random.Random(0), [], []
    for run in range(6):
        m = fresh()
        for _ in range(80):
            if m.complete:
                break
            if run % 2:
                m.prepare()
                time.sleep(0.002)  # the forward
            begun = time.perf_counter()
            options = np.flatnonzero(m.allowed(()))
            (beside if run % 2 else masks).append(1e6 * (time.perf_counter() - begun))
            m.take(int(rng.choice(options)))
    for name, times in (("a mask", masks), ("prepared beside a forward", beside)):
        print(f"{name}: median {statistics.median(times):.0f} us, worst {max(times):.0f} us")
    found.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    torch.set_num_threads(1)
    sampling(parser.parse_args().batch)
    grammars()
