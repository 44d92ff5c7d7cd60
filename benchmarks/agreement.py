"""Do our engine, transformers and llama.cpp say the same? Greedy continuations of the same ids by the same weights.

    python -m benchmarks.agreement [--prompts 200] [--tokens 64] [--llama BUILD_DIR] [--run RUN_DIR] [--json out.json]

Random-weight models of the K2, Kimi Linear and K3 layouts, the same after a short training (`--run` adds the release of a
run directory), each as a Hugging Face directory for transformers and as GGUF for llama.cpp (fp32 and fp16; ours then runs
the weights that fp16 left). Where two differ: the distance of the two tokens' logits in ours and in llama.cpp, beside what
moves such distances elsewhere (`agreement_causes`: "logits", rounding alone in our own forward, at most; "engines", from
ours to llama.cpp's, in 95 of 100 places), and what the difference stood on: two logits nearer than that, or a router's
near-tie whose other side gives their token. What is neither counts under "none". "their round.": our forward with
llama.cpp's rounding gives their token.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import math
import os
import random
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
STOPS = ("<|end_of_msg|>", "<|im_end|>")  # what llama.cpp takes for the end of a generation in our vocabulary


def shapes() -> dict[str, object]:
    from tidelock.models import preset
    from tidelock.models.config import Yarn

    k2, k3 = preset("nano-k2", 1024), preset("nano-k3", 1024)
    plain = dict(kda_gate_rank=k3.kda_head_dim, gate_lower_bound=None, n_shared_experts=1, routed_expert_hidden_size=None,
                 latent_moe_use_norm=False, mla_use_output_gate=False, attn_res_block_size=None, hidden_act="silu")  # fmt: skip
    yarn = Yarn(factor=8.0, original_max_position_embeddings=64, beta_fast=1.0)
    return {
        "K2": dataclasses.replace(k2, name="k2", q_lora_rank=64, rope_scaling=yarn),
        "Kimi Linear": dataclasses.replace(k3, name="kimi-linear", **plain),
        "K3": dataclasses.replace(k3, name="k3"),
    }


def trained(model, texts: list[str], tokenizer, steps: int):
    from tidelock.train.loop import Recipe, train
    from tidelock.train.objectives import cross_entropy
    from tidelock.train.packing import stream
    from tidelock.train.samples import text_samples

    model.start_head_from_embedding()
    train(model, stream(text_samples(texts, tokenizer, 256), 2048), Recipe(lr=0.02, steps=steps, adamw_scale=0.2), cross_entropy)
    return model.eval()


def prompts_of(texts: list[str], tokenizer, n: int, seed: int) -> list[list[int]]:
    """`n` prompts of 8 to 48 ids cut out of the texts: real language for the trained, as good as noise for the others."""
    rng, out = random.Random(seed), []
    while len(out) < n:
        ids = tokenizer.encode(rng.choice(texts))
        size = 8 * (1 + len(out) % 6)
        if len(ids) > size:
            at = rng.randrange(len(ids) - size)
            out.append(ids[at : at + size])
    return out


def ours(model, prompts: list[list[int]], tokens: int, stops: tuple[int, ...]) -> list[list[int]]:
    from tidelock.engine import Engine
    from tidelock.tokens.policy import SamplingParams

    async def one(engine, prompt) -> list[int]:
        params = SamplingParams(max_tokens=tokens, temperature=0.0, stop_ids=stops)
        return [i async for chunk in engine.generate(prompt, params) for i in chunk.ids]

    async def everything() -> list[list[int]]:
        engine = Engine(model)
        try:
            return await asyncio.gather(*(one(engine, p) for p in prompts))
        finally:
            engine.close()

    return asyncio.run(everything())


def transformers_says(path: Path, prompts: list[list[int]], tokens: int, stops: tuple[int, ...]) -> list[list[int]]:
    """Batches of one length, so that nothing is padded."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kind = json.loads((path / "config.json").read_text())["model_type"]
    cls = {"deepseek_v3": transformers.DeepseekV3ForCausalLM, "kimi_linear": transformers.KimiLinearForCausalLM}[kind]
    model = cls.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    out: list[list[int]] = [[] for _ in prompts]
    for size in sorted({len(p) for p in prompts}):
        rows = [i for i, p in enumerate(prompts) if len(p) == size]
        ids = torch.tensor([prompts[i] for i in rows])
        with torch.no_grad():
            new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                                 eos_token_id=list(stops), pad_token_id=stops[0])[:, size:]  # fmt: skip
        for i, row in zip(rows, new.tolist(), strict=True):
            out[i] = row
    return out


def until(ids: list[int], stops: tuple[int, ...]) -> list[int]:
    """Up to the first stop id, without it: engines differ in whether they hand it out."""
    return ids[: next((i for i, token in enumerate(ids) if token in stops), len(ids))]


def differences(model, prompts, a, b, stops: tuple[int, ...]) -> list[tuple[list[int], int, int]]:
    """(ids up to where they part, our token, theirs) of every pair that is not the same; an end counts as the likeliest
    id that ends."""
    found = []
    for prompt, x, y in zip(prompts, a, b, strict=True):
        x, y = until(x, stops), until(y, stops)
        if x != y:
            at = next((i for i, (p, q) in enumerate(zip(x, y)) if p != q), min(len(x), len(y)))
            ids = [*prompt, *x[:at]]
            end = max(stops, key=lambda i: float(_logits(model, ids)[-1, i])) if at in (len(x), len(y)) else None
            found.append((ids, x[at] if at < len(x) else end, y[at] if at < len(y) else end))
    return found


def row_of(peer: str, model, prompts, mine, theirs, stops, narrow=None, url: str | None = None) -> dict:
    from benchmarks.agreement_causes import apart, cause, noise
    from benchmarks.llama import logprobs

    logit, router = noise(model, prompts, mine, narrow)
    between = apart(model, prompts, mine, lambda ids: logprobs(url, ids, 20)) if url else None
    limits, parted = (max(logit, between or 0.0), router), []
    for ids, x, y in differences(model, prompts, mine, theirs, stops):
        found = cause(model, ids, x, y, narrow, limits)
        if url:
            said = logprobs(url, ids, 20)
            found["theirs"] = said[y] - said[x] if x in said and y in said else None
        parted.append(found)
    return {"peer": peer, "identical": len(prompts) - len(parted), "of": len(prompts), "noise": logit, "between": between,
            "router_noise": router, "differences": sorted(parted, key=lambda d: d["ours"])}  # fmt: skip


def _logits(model, ids: list[int]):
    from benchmarks.agreement_causes import look

    return look(model, ids)[0]


def usual_gap(model, prompts, answers) -> float:
    """Median distance of the two best logits over what was sampled: what a near-tie is to be measured against."""
    gaps = []
    for prompt, answer in list(zip(prompts, answers))[:20]:
        best = _logits(model, [*prompt, *answer])[len(prompt) - 1 :].topk(2).values
        gaps += (best[:, 0] - best[:, 1]).tolist()
    return statistics.median(gaps)


def rounded(model, dtype: str):
    """The model with what a GGUF file of `dtype` stores in it rounded to it, and the ids of those parameters."""
    import copy

    import torch

    from tidelock.models.hf.gguf import entries, stored_as

    model, narrow = copy.deepcopy(model), set()
    state, parameters = model.state_dict(), dict(model.named_parameters())
    for e in entries(model.config):
        if stored_as(e, e.make(*(state[n] for n in e.of)).dim(), dtype) != "float32":
            for name in e.of:
                state[name].copy_(state[name].to(getattr(torch, dtype)))
                narrow.add(id(parameters[name]))
    return model, frozenset(narrow)


def rows(name: str, model, run: Path, tokenizer_dir: Path, prompts, tokens: int, stops, binary) -> Iterator[dict]:
    from benchmarks.llama import PLAIN, complete, llama_server

    from tidelock.models import save_checkpoint
    from tidelock.models.hf import convert, save_hf
    from tidelock.models.hf.config import layout_of
    from tidelock.models.hf.gguf import llama_options

    save_checkpoint(run / "m", model)
    said = ours(model, prompts, tokens, stops)
    about = {"model": name, "usual_gap": usual_gap(model, prompts, said)}
    if layout_of(model.config) != "kimi_k3":  # transformers has no class for it
        peer = transformers_says(save_hf(model, run / "hf"), prompts, tokens, stops)
        yield about | row_of("transformers fp32", model, prompts, said, peer, stops)
    for dtype in ("float32", "float16") if binary else ():
        half, narrow = (model, None) if dtype == "float32" else rounded(model, dtype)
        gguf = convert(run / "m", run / f"{dtype}.gguf", "gguf", dtype, tokenizer=tokenizer_dir)
        mine = said if half is model else ours(half, prompts, tokens, stops)
        with llama_server(binary, gguf, options=(*PLAIN, *llama_options(model.config))) as url:
            peer = [complete(url, p, tokens) for p in prompts]
            yield about | row_of(f"llama.cpp {dtype}", half, prompts, mine, peer, stops, narrow, url)


def show(row: dict) -> None:
    parted = row["differences"]
    spread = [_spread([d.get(who) for d in parted]) for who in ("ours", "theirs")]
    kinds = [sum(d["kind"] == kind for d in parted) for kind in ("logits", "router", "unexplained")]
    print(f"{row['model']:22}{row['peer']:19}{row['identical']:>4} / {row['of']:<4}{row['identical'] / row['of']:>7.1%}"
          f"{spread[0]:>19}{spread[1]:>19}{row['usual_gap']:>9.1e}{row['noise']:>9.1e}{row['between'] or math.nan:>9.1e}"
          f"{row['router_noise']:>9.1e}"
          f"{kinds[0]:>7}{kinds[1]:>7}{kinds[2]:>7}{sum(d['same'] for d in parted):>7}", flush=True)  # fmt: skip


def _spread(values: list[float | None]) -> str:
    known = [v for v in values if v is not None]
    return f"{statistics.median(known):.1e} / {max(known):.1e}" if known else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=120, help="of training, 2048 tokens each")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument("--only", help="a shape: K2, Kimi Linear or K3")
    parser.add_argument("--llama", help="build directory of llama.cpp (default $TIDELOCK_LLAMA, else the PATH)")
    parser.add_argument("--run", type=Path, help="also the current release of this run directory")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from tidelock.cli.main import set_threads

    set_threads()
    from benchmarks.llama import find_server

    from tidelock.models import TransformerLM
    from tidelock.tokens.tokenizer import BPETokenizer
    from tidelock.train.corpus import read_texts, stdlib_files

    binary = find_server(args.llama)
    if binary is None:
        print("no llama-server (see benchmarks/llama.py for how to build it): its rows are left out")
    files = stdlib_files()
    random.Random(0).shuffle(files)
    texts = list(read_texts(files, 2_000_000))
    found: list[dict] = []
    print(f"{'':22}{'':19}{'':18}{'distance of the two tokens, median / max':>38}{'usual':>9}{'moved by rounding':>27}"
          f"{'near-tie of':>14}{'':>7}{'their':>7}")
    print(f"{'model':22}{'peer':19}{'identical':>18}{'in ours':>19}{'in theirs':>19}{'':>9}{'logits':>9}{'engines':>9}{'router':>9}"
          f"{'logits':>7}{'router':>7}{'none':>7}{'round.':>7}")  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        tokenizer = BPETokenizer.train(texts[:60], 1024)
        tokenizer.save(scratch / "tokenizer")
        prompts = prompts_of(texts, tokenizer, args.prompts, seed=1)
        stops = tuple(tokenizer.special(s) for s in STOPS)
        for name, config in shapes().items():
            if args.only and args.only != name:
                continue
            model = TransformerLM(config, seed=args.seed).eval()
            for label, m in ((f"{name}, random", model), (f"{name}, trained", None)):
                m = m or trained(model, texts, tokenizer, args.steps)
                for row in rows(label, m, scratch, scratch / "tokenizer", prompts, args.tokens, stops, binary):
                    show(row)
                    found.append(row)
        if args.run:
            from tidelock.loop.rundir import RunDir

            run = RunDir(args.run).existing()
            tokenizer = BPETokenizer.load(run.path / "tokenizer")
            model = run.load(run.path / run.registry.current().checkpoint)
            prompts = prompts_of(texts, tokenizer, args.prompts, seed=1)
            stops = tuple(tokenizer.special(s) for s in STOPS)
            for row in rows("run", model, scratch, run.path / "tokenizer", prompts, args.tokens, stops, binary):
                show(row)
                found.append(row)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
