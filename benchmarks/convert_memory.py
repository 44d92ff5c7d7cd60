"""How much memory `tidelock models convert` holds, beside the size of the largest layer of the model it converts.

    python benchmarks/convert_memory.py [--experts 48] [--json]

A K3-shaped model of a few hundred MB is written, then converted every way. The figure is the growth of the process's
resident memory over what it held before (VmHWM of /proc, reset between the ways), so Linux only.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import tempfile
from pathlib import Path

from tidelock.models import TransformerLM, preset, save_checkpoint
from tidelock.models.hf import convert
from tidelock.models.presets import first_dense, hybrid

MIB = 1 << 20


def resident(key: str) -> int:
    """VmRSS or VmHWM in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def grown(work) -> int:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=48)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    config = dataclasses.replace(preset("nano-k3", 512), mixers=hybrid(3, (3,)), ffns=first_dense(3), hidden_size=256,
                                 n_routed_experts=args.experts, routed_expert_hidden_size=256, moe_intermediate_size=384)  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        model = TransformerLM(config)
        largest = max(4 * sum(t.numel() for t in layer.state_dict().values()) for layer in model.layers)
        save_checkpoint(root / "ours", model)
        del model
        convert(root / "ours", root / "warm")  # what is imported and allocated once is not the conversion's
        rows = []
        for source, to, quantize in (("ours", "hf", None), ("ours", "hf", "mxfp4"), ("warm", "tidelock", None),
                                     ("warm", "hf", "mxfp4"), ("1", "tidelock", None), ("1", "hf", "int4")):  # fmt: skip
            peak = grown(lambda: convert(root / source, root / str(len(rows)), to, quantize=quantize, max_shard_bytes=8 * MIB))
            names = {"ours": "tidelock", "warm": "hf", "1": "hf mxfp4"}
            rows.append({"from": names[source], "to": f"{to} {quantize or ''}".strip(), "peak_mib": round(peak / MIB, 1),
                         "largest_layer_mib": round(largest / MIB, 1)})  # fmt: skip
    if args.json:
        print(json.dumps(rows))
        return
    print(f"{'from':12}{'to':14}{'peak MiB':>10}{'of the largest layer':>22}")
    for r in rows:
        print(f"{r['from']:12}{r['to']:14}{r['peak_mib']:>10}{r['peak_mib'] / r['largest_layer_mib']:>22.2f}")


if __name__ == "__main__":
    main()
