"""Do our engine, transformers and llama.cpp say the same? Greedy continuations of the same ids by the same weights.

    python -m benchmarks.agreement [--prompts 200] [--tokens 64] [--llama BUILD_DIR] [--run RUN_DIR] [--json out.json]

Random-weight models of the K2, Kimi Linear and K3 layouts, the same after a short training (`--run` adds the release of a
run directory), each as a Hugging Face directory for transformers and as GGUF for llama.cpp (fp32 and fp16; ours then runs
the weights that fp16 left). Where two differ, the gap is that of our two logits at the first differing token.

`noise`: the most that the distance of our two best logits changes, over what 20 prompts sampled, when the inputs of every
matrix product are rounded to fp16, as llama.cpp rounds them for fp16 weights (a router's near-tie that flips is part of it;
fp32 peers: as much less as fp32 is finer). `explained`: disagreements whose gap is below that.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import random
import statistics
import tempfile
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


def llama_says(binary: Path, gguf: Path, config, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    from benchmarks.llama import PLAIN, complete, llama_server

    from tidelock.models.hf.gguf import llama_options

    with llama_server(binary, gguf, options=(*PLAIN, *llama_options(config))) as url:
        return [complete(url, p, tokens) for p in prompts]


def until(ids: list[int], stops: tuple[int, ...]) -> list[int]:
    """Up to the first stop id, without it: engines differ in whether they hand it out."""
    return ids[: next((i for i, token in enumerate(ids) if token in stops), len(ids))]


def compare(model, prompts, a: list[list[int]], b: list[list[int]], stops: tuple[int, ...]) -> dict:
    """How many continuations are the same, and how near a tie our model was where they part."""
    gaps = []
    for prompt, x, y in zip(prompts, a, b, strict=True):
        x, y = until(x, stops), until(y, stops)
        if x != y:
            at = next((i for i, (p, q) in enumerate(zip(x, y)) if p != q), min(len(x), len(y)))
            gaps.append(_gap(model, [*prompt, *x[:at]], x[at] if at < len(x) else None, y[at] if at < len(y) else None, stops))
    return {"identical": len(prompts) - len(gaps), "of": len(prompts), "gaps": sorted(gaps)}


def _gap(model, ids: list[int], mine: int | None, theirs: int | None, stops: tuple[int, ...]) -> float:
    logits = _logits(model, ids)[-1]
    end = float(logits[list(stops)].max())
    return abs((end if mine is None else float(logits[mine])) - (end if theirs is None else float(logits[theirs])))


def _logits(model, ids: list[int]):
    import torch

    from tidelock.models import Batch

    with torch.no_grad():
        batch = Batch(torch.tensor(ids), torch.tensor([0, len(ids)], dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
        return model.logits(model(batch))


def usual_gap(model, prompts, answers) -> float:
    """Median distance of the two best logits over what was sampled: what a near-tie is to be measured against."""
    gaps = []
    for prompt, answer in list(zip(prompts, answers))[:20]:
        best = _logits(model, [*prompt, *answer])[len(prompt) - 1 :].topk(2).values
        gaps += (best[:, 0] - best[:, 1]).tolist()
    return statistics.median(gaps)


def noise(model, prompts, answers, dtype) -> float:
    """See the top. fp32's own rounding is 2^13 times smaller than fp16's, and so is what it does."""
    import torch

    from tidelock.models import ops

    def margins() -> torch.Tensor:
        out = []
        for (prompt, answer), best in zip(some, pairs):
            logits = _logits(model, [*prompt, *answer])[len(prompt) - 1 :]
            out.append(logits.gather(1, best).diff(dim=1)[:, 0])
        return torch.cat(out)

    some = list(zip(prompts, answers))[:20]
    pairs = [_logits(model, [*p, *a])[len(p) - 1 :].topk(2).indices for p, a in some]
    exact, backend = margins(), ops.backend(torch.empty(0))
    kept = backend.linear, backend.experts_linear
    try:
        backend.linear = lambda x, *w: kept[0](x.half().float(), *w)
        backend.experts_linear = lambda x, *w: kept[1](x.half().float(), *w)
        changed = float((margins() - exact).abs().max())
    finally:
        backend.linear, backend.experts_linear = kept
    return changed if dtype is torch.float16 else changed / 2**13


def rounded(model, dtype):
    """The model with what GGUF stores in half precision rounded to it."""
    import copy

    from tidelock.models.hf.gguf import entries

    model = copy.deepcopy(model)
    state = model.state_dict()
    for e in entries(model.config):
        if not e.exact and e.make(*(state[n] for n in e.of)).dim() >= 2:
            for name in e.of:
                state[name].copy_(state[name].to(dtype))
    return model


def rows(name: str, model, run: Path, tokenizer_dir: Path, prompts, tokens: int, stops, binary: Path | None) -> list[dict]:
    import torch

    from tidelock.models import save_checkpoint
    from tidelock.models.hf import convert, save_hf
    from tidelock.models.hf.config import layout_of

    save_checkpoint(run / "m", model)
    said, out = ours(model, prompts, tokens, stops), []
    usual = usual_gap(model, prompts, said)
    if layout_of(model.config) != "kimi_k3":  # transformers has no class for it
        peer = transformers_says(save_hf(model, run / "hf"), prompts, tokens, stops)
        out.append({"peer": "transformers fp32", **compare(model, prompts, said, peer, stops)})
    for dtype, kind in (("float32", torch.float32), ("float16", torch.float16)) if binary else ():
        half = model if kind is torch.float32 else rounded(model, kind)
        gguf = convert(run / "m", run / f"{dtype}.gguf", "gguf", dtype, tokenizer=tokenizer_dir)
        mine = said if half is model else ours(half, prompts, tokens, stops)
        peer = llama_says(binary, gguf, model.config, prompts, tokens)
        out.append({"peer": f"llama.cpp {dtype}", "noise": noise(half, prompts, mine, kind),
                    **compare(half, prompts, mine, peer, stops)})  # fmt: skip
    for row in out:
        row["noise"] = row.get("noise") or noise(model, prompts, said, torch.float32)
        row["explained"] = sum(gap <= row["noise"] for gap in row["gaps"])
    return [{"model": name, "usual_gap": usual, **row} for row in out]


def show(row: dict) -> None:
    gaps = row["gaps"]
    tie = f"{statistics.median(gaps):.1e} / {gaps[-1]:.1e}" if gaps else "-"
    print(f"{row['model']:24}{row['peer']:20}{row['identical']:>5} / {row['of']:<5}{row['identical'] / row['of']:>8.1%}"
          f"{tie:>22}{row['usual_gap']:>12.1e}{row['noise']:>10.1e}{row['explained']:>6} / {len(gaps)}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=120, help="of training, 2048 tokens each")
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
    print(f"{'model':24}{'peer':20}{'identical':>13}{'':>8}{'gap median / max':>22}{'usual gap':>12}{'noise':>10}{'explained':>11}")
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        tokenizer = BPETokenizer.train(texts[:60], 1024)
        tokenizer.save(scratch / "tokenizer")
        prompts = prompts_of(texts, tokenizer, args.prompts, seed=1)
        stops = tuple(tokenizer.special(s) for s in STOPS)
        for name, config in shapes().items():
            if args.only and args.only != name:
                continue
            model = TransformerLM(config, seed=0).eval()
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
