"""What the training commands share: a run directory, its settings, and running its stages up to a point."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path


def add_settings(p: argparse.ArgumentParser) -> None:
    p.add_argument("dir", type=Path, help="the run directory; finished stages in it are not repeated")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--preset", default="nano-k3", help="model shape (default nano-k3)")
    p.add_argument("--expert-format", choices=("int4", "mxfp4"), help="from SFT on, train routed experts as 4 bits round them (QAT)")
    p.add_argument("--text", help="add your own text files (a file or a directory) to the pretraining text")


def settings_from(args):
    """Raises UserError for an unknown preset or a --text without files."""
    from tidelock.loop.settings import DemoSettings
    from tidelock.models import preset
    from tidelock.train.corpus import user_files

    fits_here(preset(args.preset, 1024))
    text = None
    if args.text is not None:
        user_files(Path(args.text).expanduser())
        text = str(Path(args.text).expanduser().resolve())
    settings = DemoSettings(seed=args.seed, text=text, preset=args.preset)
    if args.expert_format is None:
        return settings
    later = {stage: replace(getattr(settings, stage), expert_format=args.expert_format) for stage in ("sft", "rl", "candidate")}
    return replace(settings, **later)


def fits_here(config) -> None:
    """Raises UserError when weights, gradients and momenta (fp32) cannot fit this machine's memory."""
    import os

    from tidelock.models.audit import audit
    from tidelock.tokens.errors import UserError

    need, have = 16 * audit(config)["total_params"], os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        raise UserError(f"preset {config.name!r} needs about {need / 2**30:,.0f} GiB to train, this machine has "
                        f"{have / 2**30:,.0f} GiB; choose a smaller one (`tidelock models list`)")


def run_stages(args, names: tuple[str, ...]) -> dict:
    """The named stages in order; the result of the last one."""
    from tidelock.loop.console import Console
    from tidelock.loop.demo import Demo, stage
    from tidelock.loop.rundir import RunDir
    from tidelock.loop.stages import Stages

    settings, console = settings_from(args), Console()
    demo = Demo(RunDir(args.dir), settings, console)
    stages = Stages(args.dir, json.loads(json.dumps(settings.to_dict())))
    try:
        for name in names:
            result = stage(stages, console, name, getattr(demo, name))
    finally:
        stages.close()
    print(f"checkpoint: {args.dir / 'checkpoints' / names[-1]}")
    return result
