"""Our server beside llama.cpp's, same weights at the same bits, one run: agent tool loops with shared prefixes and branches.

    python -m benchmarks.serving [--model 469m|10m|PRESET] [--weights bf16] [--threads 2] [--rounds 3] [--llama BUILD_DIR]
                                 [--out DIR] [--models DIR] [-- options of `tidelock bench serve`]

A random model is written as a run directory and as GGUF; each server is a process of its own with the same threads;
`tidelock bench serve` then takes them in turn, round after round: 16 conversations at a time of up to 6 turns, behind 4
openings, every seventh turn going two ways. Writes its table and plots, and the ratio of total tokens per second. Ours
serves packed weights (`tidelock serve --weights`), llama-server the same numbers from 16 slots with its prompt cache and
flash attention. Its threads wait for each other by spinning, which on a machine that others use costs more than the second
thread brings; so it is started twice, with one thread and with all, and the ratio is to the faster of the two. (Tried and
slower here: one unified cache with and without idle slots saved, no flash attention. `--llama-options` tries others.)
Without llama.cpp (see benchmarks/llama.py) ours is measured alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

CONTEXT = 2048
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}  # a float16 file has fp32 in it, which would slow the peer
BEST = ("-cb", "-fa", "on", "--cache-reuse", "256", "-b", "2048", "-ub", "512", "--slot-prompt-similarity", "0.02")


def model_of(name: str):
    from benchmarks.engines import SHAPES, random_model
    from tidelock.models import TransformerLM, preset

    if name in SHAPES:
        return random_model(name)
    return TransformerLM(preset(name) if not name.startswith("nano") else preset(name, 1024), seed=0)


def write_run(path: Path, name: str) -> None:
    """A run directory with a random release."""
    from tidelock.loop.rundir import RunDir
    from tidelock.models import save_checkpoint
    from tidelock.tokens.tokenizer import BPETokenizer
    from tidelock.train.corpus import read_texts, stdlib_files

    tokenizer = BPETokenizer.train(read_texts(stdlib_files(), 200_000), 512)
    tokenizer.save(path / "tokenizer")
    save_checkpoint(path / "checkpoints" / "random", model_of(name))
    RunDir(path).registry.release(path / "checkpoints" / "random")


def tidelock(*argv: str, env: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "tidelock", *argv], env=env, check=True, stdout=subprocess.PIPE, text=True)


def ratio(result: dict) -> str:
    """By load: our total tokens per second over llama-server's, median and range of the rounds' own ratios."""
    import statistics

    lines = []
    for load in dict.fromkeys(r["load"] for r in result["rounds"]):
        rounds: dict[int, dict[str, float]] = {}
        for r in result["rounds"]:
            if r["load"] == load:
                mine = rounds.setdefault(r["round"], {})
                mine[r["kind"]] = max(mine.get(r["kind"], 0.0), r["total_per_s"])
        found = sorted(r["tokens"] / r["llama"] for r in rounds.values() if len(r) == 2)
        if found:
            lines.append(f"{load}: {statistics.median(found):.2f} times llama-server's total tokens per second "
                         f"({found[0]:.2f} to {found[-1]:.2f} in {len(found)} rounds)")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="469m", help="469m or 10m (the shapes of benchmarks/engines.py), or a preset")
    parser.add_argument("--weights", default="bf16", choices=DTYPES, help="of both servers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slots", type=int, default=16, help="of llama-server")
    parser.add_argument("--llama", help="build directory of llama.cpp (default $TIDELOCK_LLAMA, else the PATH)")
    parser.add_argument("--llama-options", default=" ".join(BEST), help="of llama-server, beside threads, slots and context")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("bench"))
    parser.add_argument("--models", type=Path, metavar="DIR", help="keep the model's files here, and use what is there")
    parser.add_argument("rest", nargs="*", help="more options of `tidelock bench serve`, behind --")
    args = parser.parse_args()
    from benchmarks.llama import find_server, llama_server

    from tidelock.loop.rundir import RunDir
    from tidelock.loop.server_process import served
    from tidelock.models.hf import convert
    from tidelock.models.hf.convert import read_any_config
    from tidelock.models.hf.gguf import llama_options

    env = dict(os.environ, OMP_NUM_THREADS=str(args.threads), TIDELOCK_THREADS=str(args.threads))
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        home = args.models or Path(scratch)
        path, checkpoint = home / f"run-{args.model}", home / f"run-{args.model}" / "checkpoints" / "random"
        if not checkpoint.exists():
            write_run(path, args.model)
        words = ("--dir", str(path / "service"), "--customer", "bench", "--admin", "--json", "-")
        made = tidelock("keys", "create", *words, env=env)
        key = json.loads(made.stdout[made.stdout.index("{") :])["secret"]
        servers = ["tokens:" + stack.enter_context(served(path, args.threads, options=("--weights", args.weights)))
                   .removesuffix("/v1")]  # fmt: skip
        if (binary := find_server(args.llama)) is None:
            print("no llama-server: measuring ours alone")
        else:
            gguf = home / f"{args.model}-{args.weights}.gguf"
            if not gguf.exists():
                convert(checkpoint, gguf, "gguf", DTYPES[args.weights])
            options = (*args.llama_options.split(), *llama_options(read_any_config(checkpoint)))
            for threads in sorted({1, args.threads}):
                url = stack.enter_context(llama_server(binary, gguf, threads=threads, slots=args.slots, context=CONTEXT,
                                                       options=options))  # fmt: skip
                servers.append(f"llama:{url}")
        tidelock("bench", "serve", *servers, "--api-key", key, "--end-id", str(RunDir(path).template().stop_ids[0]),
                 "--context", str(CONTEXT), "--rounds", str(args.rounds), "--load", "agents", "--out", str(args.out),
                 *args.rest, env=env)  # fmt: skip
        text = "\n\n".join([
            f"# {args.model}, {args.weights} weights, {args.threads} threads, load average {os.getloadavg()[0]:.1f}",
            f"llama-server, in the order of its rows, with {sorted({1, args.threads})} threads",
            (args.out / "bench.md").read_text().strip(), ratio(json.loads((args.out / "bench.json").read_text())),
        ])  # fmt: skip
        (args.out / "serving.md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
