"""Training and decoding speed of nano-k3: our kernels beside the plain PyTorch path, in one run, as ratios.

    python benchmarks/ops.py [--threads 2]

Interleaves the two (A/B/A/B), takes the median of five, prints a table. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    os.environ["TIDELOCK_THREADS"] = str(args.threads)
    from tidelock.cli.main import set_threads

    set_threads()
    import torch

    from tidelock.models import Batch, Cache, CacheView, TransformerLM, ops, preset

    model = TransformerLM(preset("nano-k3", 1024))
    lengths = [250] * 8
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = Batch(torch.randint(0, 1024, (int(cu[-1]),)), cu, torch.zeros(8, dtype=torch.int32))

    def train() -> int:
        model.zero_grad()
        torch.nn.functional.cross_entropy(model.logits(model(packed)), packed.ids).backward()
        return packed.ids.numel()

    def decode(rows: int):
        cache = Cache(model.config, rows * 20, 16, rows)
        view = CacheView(torch.arange(rows * 20, dtype=torch.int32).view(rows, 20), torch.arange(rows, dtype=torch.int32))
        batch = Batch(torch.zeros(rows, dtype=torch.int64), torch.arange(rows + 1, dtype=torch.int32),
                      torch.full((rows,), 250, dtype=torch.int32))  # fmt: skip

        def step() -> int:
            with torch.no_grad():
                model.logits(model(batch, cache, view))
            return rows

        return step

    def rate(work, native: bool) -> float:
        chosen = ops.library
        ops.library = chosen if native else (lambda: None)
        try:
            work()
            begun = time.perf_counter()
            return work() / (time.perf_counter() - begun)
        finally:
            ops.library = chosen

    print(f"{'tokens/s':28} {'kernels':>10} {'PyTorch':>10} {'ratio':>7}")
    jobs = {"forward + backward, 2000": train, "decode, batch 1": decode(1), "decode, batch 64": decode(64)}
    for name, work in jobs.items():
        ours, plain = zip(*((rate(work, True), rate(work, False)) for _ in range(5)), strict=True)
        a, b = statistics.median(ours), statistics.median(plain)
        print(f"{name:28} {a:10.0f} {b:10.0f} {a / b:7.1f}")


if __name__ == "__main__":
    main()
