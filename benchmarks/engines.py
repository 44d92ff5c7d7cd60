"""Tokens per second of our served models beside transformers and llama.cpp, same weights, in one run, as ratios.

    python -m benchmarks.engines --llama BUILD --out DIR [--size 10m|469m] [--threads 2] [--rounds 3]
    python -m benchmarks.engines --size latent --vllm VENV/bin/python --out DIR [--threads 2]

vLLM is measured as a whole, with scheduler and sampler, and so is ours beside it ("tidelock's engine").

Two random DeepSeek-V3 shapes: 10 M parameters (4 M active) and 468 M (127 M active). Every engine decodes 24 tokens
behind a prompt of 128 at batch 1, 8 and 32, and reads one prompt of 512; nothing is sampled. Engines take turns, round
after round, each in a process of its own; the table has the medians. BUILD is a CMake build of the llama.cpp in the
llama-cpp-python source package with llama-batched-bench and llama-quantize; without --llama those rows are left out.
Writes engines-SIZE.{md,json,svg}. Meant for a machine that is otherwise idle: how idle it was is part of the table. With
--clock cpu (one thread only) rates are per second of an engine's own CPU time, which other work on the machine
lengthens less.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

SHAPES = {
    "10m": dict(vocab_size=4096, hidden_size=256, layers=6, num_attention_heads=8, q_lora_rank=128, kv_lora_rank=64,
                qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32, intermediate_size=768, n_routed_experts=16,
                num_experts_per_tok=2, moe_intermediate_size=96),
    "469m": dict(vocab_size=32000, hidden_size=1024, layers=9, num_attention_heads=16, q_lora_rank=384, kv_lora_rank=256,
                 qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, intermediate_size=4352, n_routed_experts=32,
                 num_experts_per_tok=4, moe_intermediate_size=448),
    # the first with the published latent, the only one that vLLM's decoder for CPUs knows
    "latent": dict(vocab_size=4096, hidden_size=256, layers=6, num_attention_heads=8, q_lora_rank=128, kv_lora_rank=512,
                   qk_nope_head_dim=32, qk_rope_head_dim=64, v_head_dim=32, intermediate_size=768, n_routed_experts=16,
                   num_experts_per_tok=2, moe_intermediate_size=96),
}  # fmt: skip
PROMPT, NEW, LONG, BATCHES = 128, 24, 512, (1, 8, 32)
OURS, LLAMA = ("fp32", "bf16", "int8", "int4"), ("F32", "BF16", "Q8_0", "Q4_0")
EQUAL = dict(zip(OURS, LLAMA))
READ = """
long total(const long *x, long n) {
    long s = 0;
#pragma omp parallel for reduction(+ : s)
    for (long i = 0; i < n; i++) s += x[i];
    return s;
}"""


def config(size: str):
    from tidelock.models import preset

    shape = dict(SHAPES[size])
    layers = shape.pop("layers")
    ffns = ("dense",) + ("moe",) * (layers - 1)
    return dataclasses.replace(preset("small-k2"), name=size, mixers=("mla",) * layers, ffns=ffns, rope_scaling=None,
                               max_position_embeddings=4096, **shape)  # fmt: skip


def random_model(size: str):
    """Weights that 16 bits hold exactly, so that the bf16 rows of all engines compute with the fp32 rows' numbers."""
    from tidelock.models import TransformerLM
    from tidelock.models.serving import rounded_copy

    return rounded_copy(TransformerLM(config(size), seed=0), "bf16")


# -- one engine, in a process of its own ------------------------------------------------------------------------------------


def clock(work) -> float:
    now = time.process_time if os.environ.get("ENGINES_CLOCK") == "cpu" else time.perf_counter
    begun = now()
    work()
    return now() - begun


def measure(prefill, decode) -> dict[str, float]:
    """prefill(rows, length) starts `rows` sequences; decode() adds a token to each. Tokens per second."""
    rates = {}
    for rows in BATCHES:
        prefill(rows, PROMPT)
        rates[str(rows)] = rows * NEW / clock(lambda: [decode() for _ in range(NEW)])
    prefill(1, LONG)  # once for the buffers
    rates["prefill"] = LONG / clock(lambda: prefill(1, LONG))
    return rates


def ours(size: str, kind: str) -> dict[str, float]:
    import torch

    from tidelock.models import Batch, Cache, CacheView
    from tidelock.models.serving import serving_copy

    model, c, now = serving_copy(random_model(size), kind), config(size), {}

    def forward(ids, rows: int, length: int, start: int):
        cu = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
        hidden = model(Batch(ids, cu, torch.full((rows,), start, dtype=torch.int32)), now["cache"], now["view"])
        now["next"] = model.logits(hidden.view(rows, length, -1)[:, -1]).argmax(-1)

    def prefill(rows: int, length: int) -> None:
        pages = -(-(length + NEW) // 16)
        now["cache"] = Cache(c, rows * pages, 16, rows)
        table = torch.arange(rows * pages, dtype=torch.int32).view(rows, pages)
        now["view"] = CacheView(table, torch.arange(rows, dtype=torch.int32))
        forward(torch.randint(0, c.vocab_size, (rows * length,)), rows, length, 0)
        now.update(rows=rows, at=length)

    def decode() -> None:
        forward(now["next"], now["rows"], 1, now["at"])
        now["at"] += 1

    def again() -> None:
        now["at"] = PROMPT
        for _ in range(8):
            decode()

    rates, size = measure(prefill, decode), active_bytes(model)
    prefill(1, PROMPT)
    return {**rates, "bytes": size, "share": share_of_bandwidth(8 * size, again)}


def active_bytes(model) -> int:
    """Bytes of weights that one token reads."""
    c = model.config
    routed = sum(p.nbytes for p in model.packed() if p.matrices == c.n_routed_experts)
    idle = routed * (c.n_routed_experts - c.num_experts_per_tok) // c.n_routed_experts
    return sum(p.nbytes for p in model.packed()) - idle


def engine(size: str, kind: str) -> dict[str, float]:
    """The whole of it, scheduler and sampler too, measured as vLLM is (`engines_vllm`)."""
    import asyncio
    import random

    from tidelock.engine import Engine, Limits
    from tidelock.tokens.policy import SamplingParams

    limits = Limits(max_batch=max(BATCHES), draft_tokens=0, reuse=False, stream_every=NEW + 1)
    running, draw, vocab = Engine(random_model(size), weights=kind, limits=limits), random.Random(0), config(size).vocab_size

    async def one(length: int, tokens: int) -> None:
        prompt = [draw.randrange(vocab) for _ in range(length)]
        async for _ in running.generate(prompt, SamplingParams(max_tokens=tokens, temperature=0.0)):
            pass

    def took(rows: int, length: int, tokens: int) -> float:
        async def all_of_them() -> None:
            await asyncio.gather(*(one(length, tokens) for _ in range(rows)))

        return clock(lambda: asyncio.run(all_of_them()))

    took(2, PROMPT, 4)  # for the buffers
    rates = {str(b): b * NEW / max(took(b, PROMPT, NEW + 1) - took(b, PROMPT, 1), 1e-9) for b in BATCHES}
    return {**rates, "prefill": LONG / took(1, LONG, 1)}


def transformers(folder: str) -> dict[str, float]:
    import torch
    from transformers import DeepseekV3ForCausalLM

    model, now = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), {}

    def forward(ids, past) -> None:
        with torch.no_grad():
            out = model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
        now.update(past=out.past_key_values, next=out.logits[:, -1].argmax(-1, keepdim=True))

    def prefill(rows: int, length: int) -> None:
        forward(torch.randint(0, model.config.vocab_size, (rows, length)), None)

    return measure(prefill, lambda: forward(now["next"], now["past"]))


def llama(binaries: Path, file: Path, threads: int, cpu: bool) -> dict[str, float]:
    def bench(rows: int, prompt: int, new: int) -> dict:
        words = [binaries / "llama-batched-bench", "-m", file, "-t", threads, "-c", rows * (prompt + new + 256), "-b", 2048,
                 "-ub", 512, "-npp", prompt, "-ntg", new, "-npl", rows, "--output-format", "jsonl"]  # fmt: skip
        before = os.times().children_user
        done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=True)
        spent = os.times().children_user - before
        found = next((line for line in done.stdout.splitlines() if line.startswith("{")), None)
        if found is None:  # it now and then leaves before its last line is out
            return bench(rows, prompt, new)
        return {**json.loads(found), "cpu": spent}

    if not cpu:
        return {**{str(b): bench(b, PROMPT, NEW)["speed_tg"] for b in BATCHES}, "prefill": bench(1, LONG, 1)["speed_pp"]}
    decode = {str(b): b * 3 * NEW / (bench(b, PROMPT, 4 * NEW)["cpu"] - bench(b, PROMPT, NEW)["cpu"]) for b in BATCHES}
    return {**decode, "prefill": LONG / (bench(1, 2 * LONG, 1)["cpu"] - bench(1, LONG, 1)["cpu"])}


def vllm(python: Path, folder: Path, dtype: str, threads: int) -> dict[str, float]:
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind",
           "VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
           "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # fmt: skip
    words = [python, Path(__file__).with_name("engines_vllm.py"), folder, dtype, PROMPT, NEW, LONG, *BATCHES]
    done = subprocess.run([str(w) for w in words], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"vLLM failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def share_of_bandwidth(size: int, work) -> float:
    """Of the rate at which memory is read, what `work` reaches, which reads `size` bytes. Both are measured in turn, a few
    hundredths of a second each: the rate of a shared machine changes by a third within a minute."""
    shares = []
    with reader() as read:
        for _ in range(15):
            limit = read(1 << 28)
            shares.append(size / clock(work) / limit)
    return statistics.median(shares)


@contextmanager
def reader():
    """Yields what reads so many bytes of memory and says how many a second that was."""
    import ctypes

    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "read.c", Path(folder) / "read.so"
        source.write_text(READ)
        subprocess.run(["gcc", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", source, "-o", library], check=True)
        total, x = ctypes.CDLL(str(library)).total, np.ones(1 << 27, dtype=np.int64)
        yield lambda size: size / clock(lambda: total(ctypes.c_void_p(x.ctypes.data), ctypes.c_long(size // 8)))


def bandwidth() -> float:
    """Bytes per second that this machine reads from memory, at its best."""
    with reader() as read:
        return max(read(1 << 30) for _ in range(8))


# -- the run ----------------------------------------------------------------------------------------------------------------


def make_files(size: str, folder: Path, binaries: Path | None) -> None:
    """The Hugging Face directory and, for llama.cpp, the GGUF files, unless they are there already."""
    from tidelock.models.hf import save_hf

    model = None
    if not (folder / f"{size}-hf").exists():
        model = random_model(size)
        save_hf(model, folder / f"{size}-hf")
    for kind, dtype in (("F32", "float32"), ("BF16", "bfloat16")) if binaries else ():
        if not (folder / f"{size}-{kind}.gguf").exists():
            from tidelock.models.hf.gguf import write_gguf
            from tidelock.models.hf.gguf_vocab import read_vocabulary

            model = model or random_model(size)
            state, c = model.state_dict(), model.config
            write_gguf(folder / f"{size}-{kind}.gguf", c, state.__getitem__, read_vocabulary(None, c.vocab_size), dtype)
    for kind in ("Q8_0", "Q4_0") if binaries else ():
        target = folder / f"{size}-{kind}.gguf"
        if not target.exists():
            words = [binaries / "llama-quantize", folder / f"{size}-F32.gguf", target, kind, "2"]
            subprocess.run([str(w) for w in words], check=True, capture_output=True)


def worker(*words: str, threads: int, clock: str) -> dict[str, float]:
    """One engine's rates, from a process of its own."""
    env = {**os.environ, "ENGINES_CLOCK": clock, "TIDELOCK_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "benchmarks.engines", "--worker", *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def idle_percent(seconds: float = 2.0) -> float:
    """How idle the processors are, from /proc/stat."""

    def ticks() -> list[int]:
        return [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]

    before = ticks()
    time.sleep(seconds)
    spent = [b - a for a, b in zip(before, ticks())]
    return 100 * (spent[3] + spent[4]) / max(1, sum(spent))


def run(size: str, args: argparse.Namespace, folder: Path) -> dict:
    make_files(size, folder, args.llama)
    engines = {f"tidelock {kind}": ("ours", size, kind) for kind in OURS}
    engines["transformers fp32"] = ("transformers", str(folder / f"{size}-hf"))
    if args.vllm:
        engines |= {f"vllm {dtype}": ("vllm", dtype) for dtype in ("float32", "bfloat16")}
        engines |= {f"tidelock's engine {kind}": ("engine", size, kind) for kind in ("fp32", "bf16")}
    if args.llama:
        engines |= {f"llama.cpp {kind}": kind for kind in LLAMA}
    taken = {name: [] for name in engines}
    load, idle, read = os.getloadavg()[0], [], []
    for turn in range(args.rounds):
        for name, words in engines.items():
            if words[0] in ("transformers", "vllm") and turn >= 2:
                continue  # slow, and far from any line
            idle.append(idle_percent(0.5))
            if isinstance(words, str):
                taken[name].append(llama(args.llama, folder / f"{size}-{words}.gguf", args.threads, args.clock == "cpu"))
            elif words[0] == "vllm":
                taken[name].append(vllm(args.vllm, folder / f"{size}-hf", words[1], args.threads))
            else:
                taken[name].append(worker(*words, threads=args.threads, clock=args.clock))
            print(f"{size} round {turn + 1} {name}: {taken[name][-1]}", file=sys.stderr, flush=True)
        read.append(worker("bandwidth", threads=args.threads, clock=args.clock))
    columns = [*map(str, BATCHES), "prefill", "bytes", "share"]
    rates = {name: {c: statistics.median(r[c] for r in runs) for c in columns if c in runs[0]}
             for name, runs in taken.items()}  # fmt: skip
    return dict(size=size, threads=args.threads, clock=args.clock, rounds=args.rounds, load=load,
                idle=statistics.median(idle), bandwidth=statistics.median(read), rates=rates, runs=taken)  # fmt: skip


# -- what is written --------------------------------------------------------------------------------------------------------


def ratios(result: dict) -> list[tuple[str, float]]:
    """The lines that the engine is judged by."""
    rates = result["rates"]
    lines = [(f"{mine} / transformers fp32, batch {b}", rates[mine][b] / rates["transformers fp32"][b])
             for mine in ("tidelock fp32", "tidelock bf16") for b in ("1", "8")]  # fmt: skip
    for mine, theirs in (("tidelock's engine fp32", "vllm float32"), ("tidelock's engine bf16", "vllm bfloat16")):
        if theirs in rates:
            lines += [(f"{mine} / {theirs}, {c if c == 'prefill' else f'batch {c}'}", rates[mine][c] / rates[theirs][c])
                      for c in (*map(str, BATCHES), "prefill")]  # fmt: skip
    for kind, theirs in EQUAL.items():
        if f"llama.cpp {theirs}" in rates:
            for column in (*map(str, BATCHES), "prefill"):
                at = f"batch {column}" if column != "prefill" else column
                ratio = rates[f"tidelock {kind}"][column] / rates[f"llama.cpp {theirs}"][column]
                lines.append((f"tidelock {kind} / llama.cpp {theirs}, {at}", ratio))
    for kind in OURS:
        lines.append((f"tidelock {kind}: share of the memory bandwidth limit, batch 1", rates[f"tidelock {kind}"]["share"]))
    return lines


def markdown(result: dict) -> str:
    text = [f"# {result['size']}, {result['threads']} threads, {result['clock']} clock", "",
            f"Tokens per second, medians of {result['rounds']} interleaved rounds; load {result['load']:.1f} before, "
            f"processors {result['idle']:.0f} % idle between runs, memory read at {result['bandwidth'] / 1e9:.1f} GB/s.", "",
            "| engine | batch 1 | batch 8 | batch 32 | prefill 512 |", "|---|---|---|---|---|"]  # fmt: skip
    for name, row in result["rates"].items():
        text.append(f"| {name} | " + " | ".join(f"{row[c]:.0f}" for c in (*map(str, BATCHES), "prefill")) + " |")
    text += ["", "| ratio | |", "|---|---|", *(f"| {name} | {value:.2f} |" for name, value in ratios(result)), ""]
    return "\n".join(text)


def plot(result: dict) -> str:
    """Bars by batch, one colour an engine family; lengths are tokens per second on a scale of their own per batch."""
    rows, y, names = [], 30, list(result["rates"])
    colours = {"tidelock": "#2563eb", "tidelock's": "#1e3a8a", "vllm": "#16a34a", "llama.cpp": "#f59e0b",
               "transformers": "#6b7280"}  # fmt: skip
    for column in (*map(str, BATCHES), "prefill"):
        top = max(result["rates"][n][column] for n in names)
        title = f"batch {column}" if column != "prefill" else column
        rows.append(f'<text x="10" y="{y}" font-weight="bold">{title}</text>')
        for name in names:
            value = result["rates"][name][column]
            y += 18
            long, colour = 380 * value / top, colours[name.split()[0]]
            rows.append(f'<text x="150" y="{y}" text-anchor="end">{name}</text>'
                        f'<rect x="158" y="{y - 11}" width="{long:.1f}" height="13" fill="{colour}"/>'
                        f'<text x="{164 + long:.1f}" y="{y}">{value:.0f}</text>')  # fmt: skip
        y += 34
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="640" height="{y}" font-family="sans-serif" font-size="12">'
            f'<rect width="100%" height="100%" fill="white"/>{"".join(rows)}</svg>\n')  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", type=Path, metavar="DIR", help="a build directory of llama.cpp")
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="of an environment with vLLM; goes with --size latent")
    parser.add_argument("--out", type=Path, default=Path("."), help="where the tables and plots go")
    parser.add_argument("--models", type=Path, metavar="DIR", help="keep the model files here, and use those that are there")
    parser.add_argument("--size", choices=SHAPES, action="append", help="default: 10m and 469m")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.llama and (args.llama / "bin").is_dir():
        args.llama /= "bin"
    if args.vllm and (args.size != ["latent"] or args.clock == "cpu"):
        parser.error("--vllm needs --size latent, the one shape it decodes on a CPU, and the wall clock")
    if args.clock == "cpu" and args.threads != 1:
        parser.error("--clock cpu measures one thread; add --threads 1")
    if args.worker:
        from tidelock.cli.main import set_threads

        set_threads()
        kind, *rest = args.worker
        workers = {"ours": ours, "engine": engine, "transformers": transformers, "bandwidth": bandwidth}
        print(json.dumps(workers[kind](*rest)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.models or Path(scratch)
        for path in (folder, args.out):
            path.mkdir(parents=True, exist_ok=True)
        for size in args.size or ("10m", "469m"):
            result = run(size, args, folder)
            (args.out / f"engines-{size}.json").write_text(json.dumps(result, indent=1) + "\n")
            (args.out / f"engines-{size}.md").write_text(markdown(result))
            (args.out / f"engines-{size}.svg").write_text(plot(result))
            print(markdown(result))


if __name__ == "__main__":
    main()
