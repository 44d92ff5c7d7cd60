"""Our server beside llama.cpp's, same weights, one run: Poisson arrivals and agent tool loops with shared prefixes.

    python -m benchmarks.serving [--preset small-k2] [--dtype bfloat16] [--threads 2] [--rounds 3] [--llama BUILD_DIR]
                                 [--out DIR] [-- options of `tidelock bench serve`]

A random model of the preset is written as a run directory and as GGUF; each server is a process of its own with the same
threads; `tidelock bench serve` then takes them in turn. Without llama.cpp (see benchmarks/llama.py) ours is measured alone.
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


def write_run(path: Path, preset_name: str) -> tuple[object, int]:
    """A run directory with a random release; (its config, the id that ends a message)."""
    from tidelock.loop.rundir import RunDir
    from tidelock.models import TransformerLM, preset, save_checkpoint
    from tidelock.tokens.tokenizer import BPETokenizer
    from tidelock.train.corpus import read_texts, stdlib_files

    tokenizer = BPETokenizer.train(read_texts(stdlib_files(), 200_000), 512)
    tokenizer.save(path / "tokenizer")
    config = preset(preset_name) if not preset_name.startswith("nano") else preset(preset_name, 1024)
    save_checkpoint(path / "checkpoints" / "random", TransformerLM(config, seed=0))
    run = RunDir(path)
    run.registry.release(path / "checkpoints" / "random")
    return config, run.template().stop_ids[0]


def tidelock(*argv: str, env: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "tidelock", *argv], env=env, check=True, stdout=subprocess.PIPE, text=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano-k2")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"), help="of the GGUF's matrices")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slots", type=int, default=16, help="of llama-server")
    parser.add_argument("--llama", help="build directory of llama.cpp (default $TIDELOCK_LLAMA, else the PATH)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("bench"))
    parser.add_argument("rest", nargs="*", help="more options of `tidelock bench serve`, behind --")
    args = parser.parse_args()
    from benchmarks.llama import find_server, llama_server

    from tidelock.loop.server_process import served
    from tidelock.models.hf import convert
    from tidelock.models.hf.gguf import llama_options

    env = dict(os.environ, OMP_NUM_THREADS=str(args.threads), TIDELOCK_THREADS=str(args.threads))
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        path = Path(scratch) / "run"
        config, end_id = write_run(path, args.preset)
        made = tidelock("keys", "create", "--dir", str(path / "service"), "--customer", "bench", "--admin", "--json", "-", env=env)
        key = json.loads(made.stdout[made.stdout.index("{") :])["secret"]
        servers = ["tokens:" + stack.enter_context(served(path, args.threads)).removesuffix("/v1")]
        if (binary := find_server(args.llama)) is None:
            print("no llama-server: measuring ours alone")
        else:
            gguf = convert(path / "checkpoints" / "random", Path(scratch) / "m.gguf", "gguf", args.dtype)
            url = stack.enter_context(llama_server(binary, gguf, threads=args.threads, slots=args.slots, context=CONTEXT,
                                                   options=tuple(llama_options(config))))  # fmt: skip
            servers.append(f"llama:{url}")
        done = tidelock("bench", "serve", *servers, "--api-key", key, "--end-id", str(end_id), "--context", str(CONTEXT),
                        "--rounds", str(args.rounds), "--out", str(args.out), *args.rest, env=env)  # fmt: skip
        print(f"{args.preset}, {args.threads} threads, GGUF {args.dtype}, load average {os.getloadavg()[0]:.1f}\n")
        print(done.stdout)


if __name__ == "__main__":
    main()
