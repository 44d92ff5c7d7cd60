"""`tidelock models`: the shapes we know, what they cost, and checkpoints between layouts."""

from __future__ import annotations

from pathlib import Path

from .main import command


def add(subparsers) -> None:
    p = command(subparsers, "models", None, "list model shapes, show what one costs, convert checkpoints",
                "tidelock models list\n  tidelock models show k3 --context 131072 --svg k3.svg\n"
                "  tidelock models convert demo-run/checkpoints/candidate out --to hf\n"
                "  tidelock models convert demo-run/checkpoints/candidate tide.gguf --to gguf --dtype bfloat16")  # fmt: skip
    actions = p.add_subparsers(dest="action", required=True, metavar="ACTION")
    command(actions, "list", run_list, "list the presets", "tidelock models list")
    show = command(actions, "show", run_show, "count parameters, cache and FLOPs of a preset or a checkpoint's config",
                   "tidelock models show k3 --context 131072 --svg k3.svg")  # fmt: skip
    show.add_argument("model", help="a preset, or a directory with a config.json (ours or Hugging Face)")
    show.add_argument("--context", type=int, default=8192, help="tokens per sequence (default 8192)")
    show.add_argument("--svg", type=Path, help="also draw it to this file")
    c = command(actions, "convert", run_convert, "rewrite a checkpoint: Hugging Face layout to ours or back, or llama.cpp's GGUF",
                "tidelock models convert demo-run/checkpoints/candidate out --to hf --quantize mxfp4")  # fmt: skip
    c.add_argument("source", type=Path)
    c.add_argument("target", type=Path)
    c.add_argument("--to", choices=("hf", "tidelock", "gguf"), default="hf", help="gguf writes one file for llama.cpp")
    c.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of what is not an fp32 island")
    c.add_argument("--quantize", choices=("int4", "mxfp4", "none"), help="pack the routed experts (default: as the shape says)")
    c.add_argument("--tokenizer", type=Path, help="directory of its files (default: beside the checkpoint, or of its run)")
    c.add_argument("--shard-gib", type=float, default=5.0, help="largest file (default 5)")


def run_list(args) -> dict:
    from tidelock.models import PRESETS, preset
    from tidelock.models.audit import audit
    from tidelock.models.drawing import human

    found = []
    for name in PRESETS:
        figures = audit(preset(name))
        found.append({k: figures[k] for k in ("name", "total_params", "active_params")})
        if args.json != "-":
            layers = preset(name).num_layers
            print(f"{name:18} {human(figures['total_params']):>8} total  {human(figures['active_params']):>8} active  {layers} layers")
    return {"presets": found}


def run_show(args) -> dict:
    from tidelock.models.audit import audit
    from tidelock.models.drawing import draw
    from tidelock.tokens.errors import UserError

    if args.context < 1:
        raise UserError(f"--context is a number of tokens, got {args.context}")
    config = _config(args.model)
    figures = audit(config, args.context)
    if args.svg is not None:
        try:
            args.svg.write_text(draw(config, figures))
        except OSError as e:
            raise UserError(f"cannot write {args.svg}: {e.strerror}") from None
    if args.json != "-":
        print(table(figures))
    return figures


def _config(model: str):
    from tidelock.models import PRESETS, preset
    from tidelock.models.hf import read_any_config

    return preset(model) if model in PRESETS or not Path(model).is_dir() else read_any_config(model)


def table(figures: dict) -> str:
    from tidelock.models.drawing import human

    lines = [f"{figures['name']}: {figures['total_params']:,} parameters, {figures['active_params']:,} active "
             f"({figures['active_params_without_embedding']:,} without the input embedding)", "",
             f"{'component':22}{'count':>8}{'parameters':>22}{'active':>20}{'decode FLOPs':>16}"]  # fmt: skip
    for r in figures["components"]:
        lines.append(f"{r['name']:22}{r['count']:>8,}{r['total']:>22,}{r['active']:>20,}{human(r['flops_decode']):>16}")
    flops = figures["flops_per_token"]
    lines += ["", f"weights          {figures['weight_bytes']:,} bytes as published (bf16, routed experts in their own format)",
              f"cache            {figures['cache_bytes_per_token']:,} bytes per token (bf16)",
              f"KDA state        {figures['state_bytes_per_sequence']:,} bytes per sequence (fp32), "
              f"convolution tails {figures['conv_tail_bytes_per_sequence']:,}",
              f"FLOPs per token  train {human(flops['train'])}, decode {human(flops['decode'])} at {figures['context']:,} tokens"]  # fmt: skip
    return "\n".join(lines)


def run_convert(args) -> dict:
    from tidelock.loop.console import Console
    from tidelock.models.hf import convert, read_any_config
    from tidelock.models.hf.gguf import llama_options
    from tidelock.tokens.errors import UserError

    if args.target.exists():
        raise UserError(f"{args.target} exists; name one that does not")
    if args.shard_gib <= 0:
        raise UserError(f"--shard-gib must be positive, got {args.shard_gib}")
    seen = 0
    with Console().progress("convert", 1, "tensors") as bar:
        def on_tensor(done: int, total: int) -> None:
            nonlocal seen
            bar.retotal(total)
            bar.advance(done - seen)
            seen = done

        convert(args.source, args.target, args.to, args.dtype, args.quantize, int(args.shard_gib * 2**30), on_tensor,
                args.tokenizer)  # fmt: skip
    if args.target.is_file():
        run = ["llama-server", "-m", str(args.target), *llama_options(read_any_config(args.source))]
        print(f"{args.target}: {args.target.stat().st_size / 2**20:.1f} MiB; serve it with: {' '.join(run)}")
        return {"target": str(args.target), "files": [args.target.name], "run": run}
    files = sorted(p.name for p in args.target.iterdir())
    print(f"{args.target}: {', '.join(files[:6])}{' ...' if len(files) > 6 else ''}")
    return {"target": str(args.target), "files": files}
