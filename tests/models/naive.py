"""Kimi Linear and K3 a second time: NumPy, float64, one token and one expert at a time, in the order of the reports.

It shares nothing with `tidelock.models`: it reads the published config.json and the published tensor names, so what it
checks is the whole way from a checkpoint on disk to its logits. Sections are those of the K3 report (2607.24653) and of
the code that loads its checkpoint.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


class Naive:
    """`Naive(directory)(ids)` -> logits [T, V] of one sequence."""

    def __init__(self, directory):
        config = json.loads((Path(directory) / "config.json").read_text())
        self.c = config.get("text_config", config)
        self.w = {}
        for file in sorted(Path(directory).glob("*.safetensors")):
            for name, value in load_file(file).items():
                self.w[name.removeprefix("language_model.")] = value.astype(np.float64)
        self.read = set()
        self.eps = self.c["rms_norm_eps"]

    def __getitem__(self, name):
        self.read.add(name)
        return self.w[name]

    def linear(self, x, name):
        return x @ self[f"{name}.weight"].T

    def norm(self, x, name, eps=None):
        return rms_norm(x, self[f"{name}.weight"], self.eps if eps is None else eps)

    def __call__(self, ids):
        x = self["model.embed_tokens.weight"][np.asarray(ids)]
        block = self.c.get("attn_res_block_size")
        x = self.plain(x) if block is None else self.attention_residuals(x, block) if block else self.full_attention_residuals(x)
        return self.linear(self.norm(x, "model.norm"), "lm_head")

    def plain(self, x):
        for i in range(self.c["num_hidden_layers"]):
            name = f"model.layers.{i}"
            x = x + self.mixer(self.norm(x, f"{name}.input_layernorm"), i)
            x = x + self.ffn(self.norm(x, f"{name}.post_attention_layernorm"), i)
        return x

    def attention_residuals(self, prefix, block):
        """Eq. 8-10 as the checkpoint's code runs them: a bank of finished block sums, and the running sum `prefix`."""
        bank = []
        for i in range(self.c["num_hidden_layers"]):
            name = f"model.layers.{i}"
            h = prefix if not bank else self.mix(prefix, bank, f"{name}.self_attention_res")
            if i % block == 0:
                bank.append(prefix)  # the first block is the embedding
                prefix = None
            a = self.mixer(self.norm(h, f"{name}.input_layernorm"), i)
            prefix = a if prefix is None else prefix + a
            m = self.mix(prefix, bank, f"{name}.mlp_res")
            prefix = prefix + self.ffn(self.norm(m, f"{name}.post_attention_layernorm"), i)
        return self.mix(prefix, bank, "model.output_attn_res")

    def full_attention_residuals(self, embedding):
        """Eq. 8-9: every sub-layer attends to the embedding and to the output of every sub-layer before it."""
        v = [embedding]
        for i in range(self.c["num_hidden_layers"]):
            name = f"model.layers.{i}"
            h = self.mix(v[-1], v[:-1], f"{name}.self_attention_res") if i else embedding
            v.append(self.mixer(self.norm(h, f"{name}.input_layernorm"), i))
            h = self.mix(v[-1], v[:-1], f"{name}.mlp_res")
            v.append(self.ffn(self.norm(h, f"{name}.post_attention_layernorm"), i))
        return self.mix(v[-1], v[:-1], "model.output_attn_res")

    def mix(self, prefix, bank, name):
        values = np.stack([*bank, prefix], axis=1)  # [T, n + 1, d]
        keys = values / np.sqrt((values**2).mean(-1, keepdims=True) + self.eps)
        w = self[f"{name}_norm.weight"] * self[f"{name}_proj.weight"][0]
        return (softmax((keys * w).sum(-1))[..., None] * values).sum(1)

    def mixer(self, x, i):
        full = (i + 1) in self.c["linear_attn_config"]["full_attn_layers"]
        return (self.mla if full else self.kda)(x, f"model.layers.{i}.self_attn")

    def mla(self, x, name):
        """Gated MLA without positions (Eq. 7): keys and values of every head spelled out."""
        c, t = self.c, len(x)
        nope, rope, vd, heads = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"], c["num_attention_heads"]
        if c.get("q_lora_rank"):
            q = self.linear(self.norm(self.linear(x, f"{name}.q_a_proj"), f"{name}.q_a_layernorm", 1e-6), f"{name}.q_b_proj")
        else:
            q = self.linear(x, f"{name}.q_proj")
        kv = self.linear(x, f"{name}.kv_a_proj_with_mqa")
        latent, shared = kv[:, : c["kv_lora_rank"]], kv[:, c["kv_lora_rank"] :]
        up = self.linear(self.norm(latent, f"{name}.kv_a_layernorm", 1e-6), f"{name}.kv_b_proj").reshape(t, heads, nope + vd)
        out = np.zeros((t, heads, vd))
        for h in range(heads):
            queries = q.reshape(t, heads, nope + rope)[:, h]
            keys = np.concatenate([up[:, h, :nope], shared], axis=-1)
            for i in range(t):
                p = softmax(keys[: i + 1] @ queries[i] / np.sqrt(nope + rope))
                out[i, h] = p @ up[: i + 1, h, nope:]
        out = out.reshape(t, -1)
        if c.get("mla_use_output_gate"):
            out = out * sigmoid(self.linear(x, f"{name}.g_proj"))
        return self.linear(out, f"{name}.o_proj")

    def kda(self, x, name):
        """Kimi Delta Attention (Eq. 1-6), one token at a time."""
        c, t = self.c["linear_attn_config"], len(x)
        heads, d = c["num_heads"], c["head_dim"]

        def conv(y, kind):  # causal, depthwise, then SiLU
            w = self[f"{name}.{kind}_conv1d.weight"][:, 0]
            padded = np.concatenate([np.zeros((w.shape[1] - 1, y.shape[1])), y])
            return silu(np.stack([(padded[i : i + w.shape[1]].T * w).sum(-1) for i in range(t)])).reshape(t, heads, d)

        q, k, v = (conv(self.linear(x, f"{name}.{kind}_proj"), kind) for kind in "qkv")
        q, k = (y / np.sqrt((y * y).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
        q = q / np.sqrt(d)
        z = self.linear(self.linear(x, f"{name}.f_a_proj"), f"{name}.f_b_proj") + self[f"{name}.dt_bias"]
        z, a = z.reshape(t, heads, d), np.exp(self[f"{name}.A_log"].reshape(-1)[:heads])[:, None]
        bound = c.get("gate_lower_bound")
        g = bound * sigmoid(a * z) if bound is not None else -a * np.logaddexp(z, 0)
        beta = sigmoid(self.linear(x, f"{name}.b_proj"))
        out, state = np.zeros((t, heads, d)), np.zeros((heads, d, d))
        for i in range(t):
            for h in range(heads):
                s = np.exp(g[i, h])[:, None] * state[h]
                s = s + beta[i, h] * np.outer(k[i, h], v[i, h] - k[i, h] @ s)
                out[i, h], state[h] = s.T @ q[i, h], s
        if c.get("use_full_rank_gate"):
            gate = self.linear(x, f"{name}.g_proj")
        else:
            gate = self.linear(self.linear(x, f"{name}.g_a_proj"), f"{name}.g_b_proj")
        out = self.norm(out, f"{name}.o_norm") * sigmoid(gate.reshape(t, heads, d))
        return self.linear(out.reshape(t, -1), f"{name}.o_proj")

    def glu(self, gate, up):
        """SiTU-GLU (Eq. 12) or SwiGLU."""
        if self.c["hidden_act"] == "silu":
            return silu(gate) * up
        b1, b2 = self.c["activation_situ_beta"], self.c["activation_situ_linear_beta"]
        return b1 * np.tanh(gate / b1) * sigmoid(gate) * b2 * np.tanh(up / b2)

    def dense(self, x, name, names=("gate_proj", "up_proj", "down_proj")):
        gate, up, down = names
        return self.linear(self.glu(self.linear(x, f"{name}.{gate}"), self.linear(x, f"{name}.{up}")), f"{name}.{down}")

    def ffn(self, x, i):
        if i < self.c["first_k_dense_replace"]:
            return self.dense(x, f"model.layers.{i}.mlp")
        name, c = f"model.layers.{i}.block_sparse_moe", self.c
        scores = sigmoid(self.linear(x, f"{name}.gate"))  # of the full-width input
        biased = scores + self[f"{name}.gate.e_score_correction_bias"]
        inner = self.linear(x, f"{name}.routed_expert_down_proj") if c.get("routed_expert_hidden_size") else x
        u = np.zeros_like(inner)
        for t in range(len(x)):
            chosen = np.argsort(-biased[t])[: c["num_experts_per_token"]]
            for e in chosen:
                p = scores[t, e] / scores[t, chosen].sum() * c["routed_scaling_factor"]
                u[t] += p * self.dense(inner[t], f"{name}.experts.{e}", ("w1", "w3", "w2"))
        if c.get("routed_expert_hidden_size"):
            if c["latent_moe_use_norm"]:
                u = self.norm(u, f"{name}.routed_expert_norm")
            u = self.linear(u, f"{name}.routed_expert_up_proj")
        return self.dense(x, f"{name}.shared_experts") + u
