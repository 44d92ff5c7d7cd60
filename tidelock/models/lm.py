"""The language model: embedding, layers, head. One forward serves training, prefill and decode."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .batch import Batch, Cache, CacheView
from .config import ModelConfig
from .layers import GLU, KDA, MLA, Linear, Mix, MoE, RMSNorm


class Layer(nn.Module):
    """A token mixer and an FFN, with their norms and (with Attention Residuals) their depth mixers."""

    def __init__(self, c: ModelConfig, index: int) -> None:
        super().__init__()
        self.self_attn = KDA(c) if c.mixers[index] == "kda" else MLA(c)
        self.mlp = MoE(c) if c.ffns[index] == "moe" else GLU(c, c.hidden_size, c.intermediate_size)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        if c.attn_res_block_size is not None:
            self.self_attention_res, self.mlp_res = Mix(c), Mix(c)


class TransformerLM(nn.Module):
    """Decoder-only LM with pluggable mixers (MLA, KDA), FFNs (dense, MoE) and residual streams (plain, attention)."""

    def __init__(self, config: ModelConfig, seed: int | None = 0) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_tokens.weight.optim = "adamw"
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        if config.attn_res_block_size is not None:
            self.output_res = Mix(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.lm_head.weight.optim = "adamw"
        if seed is not None:
            self.initialise(seed)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """N(0, initializer_range) weights; A_log 0 and dt_bias softplus^-1 of logU[1e-3, 0.1] (K3 §2.1); mixers of
        Attention Residuals 0, which makes every sub-layer start from the plain mean of its sources."""
        rng = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if name.endswith("dt_bias"):
                dt = torch.exp(torch.rand(p.shape, generator=rng) * math.log(100) + math.log(1e-3))
                p.copy_(dt + torch.log(-torch.expm1(-dt)))
            elif "_res.proj" in name or name.endswith("A_log"):
                p.zero_()
            elif name.endswith(".conv"):
                p.copy_(torch.rand(p.shape, generator=rng).sub(0.5) * 2 / math.sqrt(p.shape[1]))
            elif p.dim() >= 2:
                p.copy_(torch.randn(p.shape, generator=rng) * self.config.initializer_range)
        # Untied, but from a common start: saying a token that was read is then nearly the identity, and copying names
        # and numbers, most of what an agent's turns are, is learned in a fraction of the steps.
        self.lm_head.weight.copy_(self.embed_tokens.weight)

    def forward(self, batch: Batch, cache: Cache | None = None, view: CacheView | None = None) -> Tensor:
        """Hidden states fp32 [N, d] of the new rows. With a cache, each sequence continues from (and updates) its own."""
        if view is not None:
            batch = Batch(batch.ids, batch.cu, batch.start, view)
        embedded = self.embed_tokens(batch.ids)
        run = self._plain if self.config.attn_res_block_size is None else self._attention_residuals
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

    def parameter_counts(self) -> tuple[int, int]:
        """(total, active per token without the input embedding)."""
        c = self.config
        total = sum(p.numel() for p in self.parameters())
        routed = sum(p.numel() for n, p in self.named_parameters() if n.endswith(("w_in", "w_out")))
        active_routed = routed * c.num_experts_per_tok // max(1, c.n_routed_experts)
        return total, total - self.embed_tokens.weight.numel() - routed + active_routed
