"""The language model: embedding, layers, head. One forward serves training, prefill and decode."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from . import ops
from .batch import Batch, Cache, CacheView
from .config import ModelConfig
from .layers import GLU, KDA, MLA, Linear, Mix, MoE, RMSNorm


# What stays fp32 in any dtype: the published checkpoints' fp32 tensors, and the router, whose products are fp32.
ISLANDS = ("A_log", "dt_bias", "e_score_correction_bias", ".conv", "o_norm.weight", "mlp.gate.weight")


class Layer(nn.Module):
    """A token mixer and an FFN, with their norms and (with Attention Residuals) their depth mixers."""

    def __init__(self, c: ModelConfig, index: int, attention_residuals: bool) -> None:
        super().__init__()
        self.self_attn = KDA(c) if c.mixers[index] == "kda" else MLA(c)
        self.mlp = MoE(c) if c.ffns[index] == "moe" else GLU(c, c.hidden_size, c.intermediate_size)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        if attention_residuals:
            self.self_attention_res, self.mlp_res = Mix(c), Mix(c)


class MTP(nn.Module):
    """One multi-token prediction layer (DeepSeek-V3 §2.2): from the state at t and token t + 1 to a state that
    predicts token t + 2.  h' = Layer(W [RMSNorm(embed(t+1)) | RMSNorm(h_t)]), read by the shared head after `norm`.

    Its layer is of the last layer's kind, in a plain residual stream.
    """

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        d, eps = c.hidden_size, c.rms_norm_eps
        self.enorm, self.hnorm, self.norm = RMSNorm(d, eps), RMSNorm(d, eps), RMSNorm(d, eps)
        self.eh_proj = Linear(2 * d, d)
        self.layer = Layer(c, c.num_layers - 1, attention_residuals=False)

    def forward(self, hidden: Tensor, embedded: Tensor, batch: Batch, cache=None) -> Tensor:
        """hidden [N, d] (after the model's last norm), embedded [N, d] of the tokens that follow -> [N, d].

        cache: what `self_attn` continues from, when the rows are not whole sequences."""
        x = self.eh_proj(ops.backend(hidden).concat(self.enorm(embedded), self.hnorm(hidden)))
        x = x + self.layer.self_attn(self.layer.input_layernorm(x), batch, cache)
        x = x + self.layer.mlp(self.layer.post_attention_layernorm(x))
        return self.norm(x)


class TransformerLM(nn.Module):
    """Decoder-only LM with pluggable mixers (MLA, KDA), FFNs (dense, MoE) and residual streams (plain, attention)."""

    def __init__(self, config: ModelConfig, seed: int | None = 0) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_tokens.weight.optim = "adamw"
        self.layers = nn.ModuleList(
            Layer(config, i, config.attn_res_block_size is not None) for i in range(config.num_layers)
        )
        if config.attn_res_block_size is not None:
            self.output_res = Mix(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.lm_head.weight.optim = "adamw"
        self.mtp = nn.ModuleList(MTP(config) for _ in range(config.num_mtp_layers))
        if seed is not None:
            self.initialise(seed)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """N(0, initializer_range) weights; KDA: dt_bias softplus^-1 of logU[1e-3, 0.1], A_log 0 for the bounded gate
        (K3 §2.1) and log U(1, 16) for the unbounded one (Kimi Linear); the mixers of Attention Residuals 0, which makes
        every sub-layer start from the plain mean of its sources."""
        rng = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if name.endswith("dt_bias"):
                dt = torch.exp(torch.rand(p.shape, generator=rng) * math.log(100) + math.log(1e-3))
                p.copy_(dt + torch.log(-torch.expm1(-dt)))
            elif name.endswith("A_log") and self.config.gate_lower_bound is None:
                p.copy_(torch.log(1 + 15 * torch.rand(p.shape, generator=rng)))
            elif "_res.proj" in name or name.endswith("A_log"):
                p.zero_()
            elif name.endswith(".conv"):
                p.copy_(torch.rand(p.shape, generator=rng).sub(0.5) * 2 / math.sqrt(p.shape[1]))
            elif p.dim() >= 2:
                p.copy_(torch.randn(p.shape, generator=rng) * self.config.initializer_range)

    @torch.no_grad()
    def start_head_from_embedding(self) -> None:
        """Untied, but from a common start: saying a token that was read is then nearly the identity, and copying names
        and numbers, most of what an agent's turns are, is learned in a fraction of the steps. For small models."""
        self.lm_head.weight.copy_(self.embed_tokens.weight)

    def forward(self, batch: Batch, cache: Cache | None = None, view: CacheView | None = None) -> Tensor:
        """Hidden states fp32 [N, d] of the new rows. With a cache, each sequence continues from (and updates) its own."""
        if view is not None:
            batch = Batch(batch.ids, batch.cu, batch.start, view)
        return self.hidden(self.embed_tokens(batch.ids), batch, cache)

    def hidden(self, embedded: Tensor, batch: Batch, cache: Cache | None) -> Tensor:
        """The layers and the last norm: embedded [N, d] -> [N, d]."""
        run = {None: self._plain, 0: self._full_attention_residuals}.get(self.config.attn_res_block_size, self._attention_residuals)
        return self.norm(run(embedded, batch, cache))

    def _mixer(self, index: int, x: Tensor, batch: Batch, cache: Cache | None) -> Tensor:
        layer, mine = self.layers[index], None
        if cache is not None:
            is_kda = self.config.mixers[index] == "kda"
            mine = (cache.states[index], cache.tails[index]) if is_kda else cache.pages[index]
        return layer.self_attn(layer.input_layernorm(x), batch, mine)

    def _plain(self, x: Tensor, batch: Batch, cache: Cache | None) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = x + self._mixer(i, x, batch, cache)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return x

    def _full_attention_residuals(self, embedded: Tensor, batch: Batch, cache: Cache | None) -> Tensor:
        """Attention Residuals (K3 Eq. 8-9): every sub-layer reads a mixture of the embedding and all outputs before it."""
        sources = [embedded]
        for i, layer in enumerate(self.layers):
            x = layer.self_attention_res(sources) if i else embedded
            sources.append(self._mixer(i, x, batch, cache))
            x = layer.mlp_res(sources)
            sources.append(layer.mlp(layer.post_attention_layernorm(x)))
        return self.output_res(sources)

    def _attention_residuals(self, embedded: Tensor, batch: Batch, cache: Cache | None) -> Tensor:
        """Block Attention Residuals (K3 Eq. 10): `bank` holds finished block sums, `partial` the running one."""
        bank, partial = [], embedded
        for i, layer in enumerate(self.layers):
            x = layer.self_attention_res([*bank, partial]) if bank else embedded
            if i % self.config.attn_res_block_size == 0:
                bank.append(partial)
                partial = self._mixer(i, x, batch, cache)
            else:
                partial = partial + self._mixer(i, x, batch, cache)
            x = layer.mlp_res([*bank, partial])
            partial = partial + layer.mlp(layer.post_attention_layernorm(x))
        return self.output_res([*bank, partial])

    def logits(self, hidden: Tensor) -> Tensor:
        """[M, d] -> [M, V] fp32."""
        return self.lm_head(hidden)

    def mtp_hidden(self, hidden: Tensor, next_ids: Tensor, batch: Batch) -> list[Tensor]:
        """States [N, d] that predict the token after `next_ids` [N], one further with every MTP layer.

        Row t of layer i reads the ids t + 1 ... t + 1 + i; rows too near their sequence's end are rubbish.
        """
        out = []
        for layer in self.mtp:
            hidden = layer(hidden, self.embed_tokens(next_ids), batch)
            out.append(hidden)
            next_ids = next_ids.roll(-1)
        return out

    def mtp_step(self, hidden: Tensor, next_ids: Tensor, batch: Batch, cache: Cache) -> Tensor:
        """The first MTP layer's states [N, d] for rows that continue what `cache`, of this one layer, holds."""
        mine = (cache.states[0], cache.tails[0]) if self.config.mixers[-1] == "kda" else cache.pages[0]
        return self.mtp[0](hidden, self.embed_tokens(next_ids), batch, mine)

    def cast(self, dtype: torch.dtype) -> TransformerLM:
        """Weights in `dtype`, all but the fp32 islands."""
        for name, t in (*self.named_parameters(), *self.named_buffers()):
            t.data = t.data.to(torch.float32 if name.endswith(ISLANDS) else dtype)
        return self

    def set_expert_format(self, format: str | None) -> None:
        """From now on routed experts compute as "int4" or "mxfp4" rounds them, in training and after; None: as they are."""
        self.config = dataclasses.replace(self.config, expert_format=format)
        for module in self.modules():
            if isinstance(module, MoE):
                module.format = format

    def parameter_counts(self) -> tuple[int, int]:
        """(total, active per token without the input embedding)."""
        c = self.config
        total = sum(p.numel() for p in self.parameters())
        routed = sum(p.numel() for n, p in self.named_parameters() if n.endswith(("w_in", "w_out")))
        active_routed = routed * c.num_experts_per_tok // max(1, c.n_routed_experts)
        return total, total - self.embed_tokens.weight.numel() - routed + active_routed
