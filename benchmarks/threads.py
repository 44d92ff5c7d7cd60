"""What a training step costs under each thread policy, alone and beside another busy process.

    python -m benchmarks.threads

An OpenMP thread that waits may spin (quick to resume, in everybody's way) or sleep. Interleaved, medians, as ratios to the
policy of the process's door (`cli.main.set_threads`). Run it on a machine that is otherwise idle.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

POLICIES = (("1", "1000"), ("2", "0"), ("2", "1000"), ("2", "20000"))  # threads, spin count; the third is ours
BURN = "while True: pass"
STEP = """
import time
from tidelock.cli.main import set_threads
set_threads()
import torch
from tidelock.models import TransformerLM, preset
from tidelock.train.loop import Recipe, Trainer
from tidelock.train.objectives import cross_entropy
from tidelock.train.packing import Sample, pack
rng, trainer = torch.Generator().manual_seed(0), Trainer(TransformerLM(preset("nano-k3", 1024)), Recipe(lr=1e-3, steps=99))
one = next(iter(pack([Sample(torch.randint(0, 1024, (250,), generator=rng).tolist(), [1.0] * 250) for _ in range(8)], 2048)))
times = []
for _ in range(10):
    begun = time.perf_counter()
    trainer.step(one, cross_entropy)
    times.append(time.perf_counter() - begun)
print(sorted(times[1:])[4])
"""


def step_s(threads: str, spin: str) -> float:
    env = dict(os.environ, TIDELOCK_THREADS=threads, GOMP_SPINCOUNT=spin)
    env.pop("OMP_NUM_THREADS", None)
    return float(subprocess.run([sys.executable, "-c", STEP], env=env, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    print(f"{'threads':>7} {'spin':>6} {'alone':>12} {'beside a busy process':>24}   ms per step of 2000 tokens (ratio to ours)")
    rows = {}
    for busy in (False, True):
        burner = subprocess.Popen([sys.executable, "-c", BURN]) if busy else None
        try:
            runs = [[step_s(*policy) for policy in POLICIES] for _ in range(3)]
        finally:
            if burner:
                burner.kill()
        for policy, *times in zip(POLICIES, *runs):
            rows.setdefault(policy, []).append(statistics.median(times))
    ours = rows[POLICIES[2]]
    for (threads, spin), times in rows.items():
        cells = [f"{t * 1e3:.0f} ({t / o:.2f})" for t, o in zip(times, ours)]
        print(f"{threads:>7} {spin:>6} {cells[0]:>12} {cells[1]:>24}")


if __name__ == "__main__":
    main()
