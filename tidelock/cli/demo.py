"""`tidelock demo`: one whole turn of the loop."""

from __future__ import annotations

from pathlib import Path

from .main import command


def add(subparsers) -> None:
    p = command(subparsers, "demo", run, "one full cycle, from training to the better model, in one directory",
                "tidelock demo --dir demo-run --seed 7 --text ~/notes")  # fmt: skip
    p.add_argument("--dir", type=Path, default=Path("demo-run"), help="where everything goes; resumes what it finds there")
    p.add_argument("--seed", type=int, default=0, help="same seed, same result (default 0)")
    p.add_argument("--text", help="add your own text files (a file or a directory) to the pretraining text")
    p.add_argument("--preset", default="nano-k3", help="model shape (default nano-k3)")


def run(args) -> dict:
    from tidelock.loop.console import Console
    from tidelock.loop.demo import run_demo
    from tidelock.loop.settings import SHARES, DemoSettings
    from tidelock.models import preset
    from tidelock.train.corpus import user_files

    preset(args.preset, 1024)
    text = None
    if args.text is not None:
        user_files(Path(args.text).expanduser())
        text = str(Path(args.text).expanduser().resolve())
    settings = DemoSettings(seed=args.seed, text=text, preset=args.preset)
    report = run_demo(args.dir, settings, Console(shares=SHARES))
    print_summary(report, args.dir)
    return report


def print_summary(report: dict, directory: Path) -> None:
    print(f"\n{'family':16} {'kind':5} {'before':>22} {'after':>22}")
    for name, f in report["families"].items():
        cells = [f"{s['success']:6.1%} [{s['low']:.2f}, {s['high']:.2f}]" for s in (f["before"], f["after"])]
        print(f"{name:16} {f['kind']:5} {cells[0]:>22} {cells[1]:>22}")
    x, ledger = report["exactness"], report["ledger"]
    print(f"\ngate {'passed' if report['gate']['passed'] else 'refused'} · ledger of {ledger['entries']} entries sums to "
          f"{ledger['sum_nano']} · {x['sessions']} sessions, {x['render_mismatches']} render mismatches, "
          f"max |dlogp| {x['max_abs_dlogp']:.1e}")  # fmt: skip
    print(f"{report['wall_s']:.0f} s, {report['peak_rss_bytes'] / 2**30:.2f} GiB · open {directory / 'report.html'}")
