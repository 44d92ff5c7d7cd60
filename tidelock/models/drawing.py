"""A shape as a picture: its layers from the first to the last, what each kind is made of, and where parameters and FLOPs
sit. Plain SVG in light and dark, from the config and the figures of `audit`; no number is computed here."""

from __future__ import annotations

from html import escape
from typing import Any

from .config import ModelConfig

COLOURS = {
    "embedding": "#8a8f98", "MLA": "#3b6fd4", "KDA": "#2a9d8f", "dense FFN": "#b07d2b", "router": "#c9506a",
    "shared experts": "#e08e45", "latent projections": "#9b6bd1", "routed experts": "#e8b04a",
    "attention residuals": "#5aa9e6", "norms": "#b7bcc4", "head": "#6b7280", "MTP": "#d16ba5",
}  # fmt: skip
WHITE_ON = {"MLA", "KDA", "dense FFN", "router", "latent projections", "head"}
STYLE = ("text{font:12px system-ui,-apple-system,'Segoe UI',sans-serif;fill:#1f2430}.muted{fill:#667085}.bg{fill:#fff}"
         ".n{text-anchor:end;font-variant-numeric:tabular-nums}.m{text-anchor:middle}.w{fill:#fff}.d{fill:#1f2430}"
         ".line{stroke:#d5d9e0}.res{stroke:#5aa9e6;fill:none;stroke-width:1.5}"
         "@media(prefers-color-scheme:dark){text{fill:#e6e8ee}.muted{fill:#9aa3b2}.bg{fill:#14171f}.w{fill:#fff}.d{fill:#14171f}"
         ".line{stroke:#333a47}}")  # fmt: skip
WIDTH, LEFT, STRIP, MAX_STEP = 960, 24, 78, 26
INNER = WIDTH - 2 * LEFT


def human(n: float) -> str:
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.5g}{suffix}"
    return f"{n:.4g}"


def draw(c: ModelConfig, figures: dict[str, Any]) -> str:
    """The SVG. `figures` from `audit`."""
    out = [text(LEFT, 32, c.name, style="font-size:20px;font-weight:600"), text(LEFT, 54, summary(c, figures), "muted")]
    y = 78
    out.append(strip(c, y))
    y += 128 if c.attn_res_block_size is None else 150
    for kind, words in parts_in_words(c):
        out += [swatch(LEFT, y, kind), text(LEFT + 18, y, kind, style="font-weight:600"), text(LEFT + 160, y, words)]
        y += 20
    y += 16
    for label, key in (("parameters", "total"), ("active per token", "active"),
                       (f"FLOPs of decoding one token after {figures['context']:,}", "flops_decode")):  # fmt: skip
        out.append(bar(y, label, figures["components"], key))
        y += 52
    out.append(table(y + 8, figures["components"]))
    height = y + 8 + 20 * len(figures["components"]) + 34
    return (f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' role='img' aria-label='{escape(c.name)}'>"
            f"<style>{STYLE}</style><rect class='bg' width='{WIDTH}' height='{height}'/>{''.join(out)}</svg>")  # fmt: skip


def summary(c: ModelConfig, f: dict[str, Any]) -> str:
    state = f", {human(f['state_bytes_per_sequence'])}B of state per sequence" if f["state_bytes_per_sequence"] else ""
    return (f"{human(f['total_params'])} parameters, {human(f['active_params_without_embedding'])} active beside the embedding; {c.num_layers} layers of width {c.hidden_size:,}; "
            f"cache {f['cache_bytes_per_token']:,} bytes per token{state}")  # fmt: skip


def strip(c: ModelConfig, y: int) -> str:
    """One column per layer, mixer above FFN, blocks of Attention Residuals bracketed below, layer numbers under it all."""
    left, out = LEFT + STRIP, []
    step = min((INNER - STRIP) / c.num_layers, MAX_STEP)
    out += [text(LEFT, y + 25, "token mixer", "muted"), text(LEFT, y + 68, "FFN", "muted")]
    for i, (mixer, ffn) in enumerate(zip(c.mixers, c.ffns)):
        for top, kind in ((y, mixer.upper()), (y + 43, "dense FFN" if ffn == "dense" else "routed experts")):
            out.append(f"<rect x='{left + i * step:.1f}' y='{top}' width='{max(step - 1.5, 1):.1f}' height='40' rx='2' "
                       f"fill='{COLOURS[kind]}'><title>layer {i + 1}: {kind}</title></rect>")  # fmt: skip
    numbers = y + 100
    if (size := c.attn_res_block_size) is not None:
        out.append(text(LEFT, y + 103, "residuals", "muted"))
        numbers += 22
        for a in range(0, c.num_layers, size) if size else range(c.num_layers):
            b = min(a + (size or 1), c.num_layers)
            x0, x1 = left + a * step + 0.75, left + b * step - 2.25
            out.append(f"<path class='res' d='M{x0:.1f} {y + 89}v9H{x1:.1f}v-9'><title>residual block of layers {a + 1} to {b}</title></path>")
    shown = sorted({0, c.num_layers - 1, *range(9, c.num_layers - 3, 10)}) if step < MAX_STEP else range(c.num_layers)
    out += [text(left + (i + 0.5) * step - 0.75, numbers, str(i + 1), "muted m") for i in shown]
    return "".join(out)


def parts_in_words(c: ModelConfig) -> list[tuple[str, str]]:
    """What each kind of layer is made of, in one line."""
    found = []

    def layers(kinds: tuple[str, ...], kind: str) -> str:
        return f"{kinds.count(kind)} layer{'s' * (kinds.count(kind) != 1)}"

    if "mla" in c.mixers:
        query = f"query rank {c.q_lora_rank:,}" if c.q_lora_rank else "queries in one step"
        position = "no positions" if c.mla_use_nope else "rotary" + (f", YaRN x{c.rope_scaling.factor:g}" if c.rope_scaling else "")
        found.append(("MLA", f"{layers(c.mixers, 'mla')}; {c.num_attention_heads} heads of {c.qk_nope_head_dim} + {c.qk_rope_head_dim}, "
                             f"{query}, latent {c.kv_lora_rank}, {position}" + (", gated output" if c.mla_use_output_gate else "")))  # fmt: skip
    if "kda" in c.mixers:
        decay = f"log-decay in ({c.gate_lower_bound:g}, 0)" if c.gate_lower_bound else "log-decay unbounded"
        gate = "full-rank gate" if c.kda_gate_rank is None else f"gate of rank {c.kda_gate_rank}"
        found.append(("KDA", f"{layers(c.mixers, 'kda')}; {c.kda_num_heads} heads of {c.kda_head_dim}, convolution over "
                             f"{c.short_conv_kernel_size}, {decay}, {gate}"))  # fmt: skip
    act = {"silu": "SwiGLU", "situ": "SiTU-GLU"}[c.hidden_act]
    if "dense" in c.ffns:
        found.append(("dense FFN", f"{layers(c.ffns, 'dense')} of {c.intermediate_size:,}, {act}"))
    if "moe" in c.ffns:
        latent = f", in a latent width of {c.routed_expert_hidden_size:,}" if c.routed_expert_hidden_size else ""
        format = f", {c.expert_format.upper()}" if c.expert_format else ""
        found.append(("routed experts", f"{layers(c.ffns, 'moe')}; {c.num_experts_per_tok} of {c.n_routed_experts} experts of "
                                        f"{c.moe_intermediate_size:,} and {c.n_shared_experts} shared, {act}{latent}{format}"))  # fmt: skip
    if c.attn_res_block_size is not None:
        size = f"blocks of {c.attn_res_block_size} layer{'s' * (c.attn_res_block_size > 1)}, the embedding before them" if c.attn_res_block_size else "full form: every sub-layer is a source"
        found.append(("attention residuals", size))
    return found


def bar(y: float, label: str, rows: list[dict], key: str) -> str:
    """Shares of the whole, side by side; the wide ones are named on the spot."""
    total, x = sum(r[key] for r in rows) or 1, float(LEFT)
    out = [text(LEFT, y, f"{label}: {human(total)}", "muted")]
    for r in rows:
        share = r[key] / total
        w = INNER * share
        if w > 0.3:
            out.append(f"<rect x='{x:.1f}' y='{y + 6}' width='{max(w - 0.5, 0.3):.1f}' height='26' fill='{COLOURS[r['name']]}'>"
                       f"<title>{r['name']}: {human(r[key])} ({share:.1%})</title></rect>")  # fmt: skip
            named = f"{r['name']} {share:.0%}"
            if w > 7 * len(named) + 8:
                out.append(text(x + w / 2, y + 23, named, "m w" if r["name"] in WHITE_ON else "m d"))
        x += w
    return "".join(out)


def table(y: float, rows: list[dict]) -> str:
    columns = ((420, "count", "count"), (580, "parameters", "total"), (740, "active", "active"), (WIDTH - LEFT, "decode FLOPs", "flops_decode"))
    out = [text(x, y, label, "muted n") for x, label, _ in columns]
    for i, r in enumerate(rows, 1):
        at = y + 20 * i
        out += [f"<path class='line' d='M{LEFT} {at - 14.5}H{WIDTH - LEFT}'/>", swatch(LEFT, at, r["name"]), text(LEFT + 18, at, r["name"])]
        out += [text(x, at, f"{r[key]:,}" if key == "count" else human(r[key]) if r[key] else "–", "n") for x, _, key in columns]
    return "".join(out)


def swatch(x: float, y: float, kind: str) -> str:
    return f"<rect x='{x}' y='{y - 10}' width='12' height='12' rx='2' fill='{COLOURS[kind]}'/>"


def text(x: float, y: float, words: str, cls: str = "", style: str = "") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' class='{cls}' style='{style}'>{escape(words)}</text>"
