"""vLLM, SGLang, llama.cpp's server and `tidelock serve` as child processes over the same small models: what
`benchmarks.real_upstreams` puts behind a gateway. None of them is installed here; each comes from where it is told.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx

from tidelock.loop.registry import Registry
from tidelock.loop.rundir import MODEL, RunDir
from tidelock.models import TransformerLM, preset, save_checkpoint
from tidelock.models.hf.convert import convert
from tidelock.service.db import Database
from tidelock.service.keys import KeyStore
from tidelock.service.ledger import Ledger
from tidelock.tokens.tokenizer import BPETokenizer

CONTEXT = 2048
SLOTS = 8  # requests that each server runs at a time; more wait in it
TEXT = 'the tides and the moon, the tide and the sea; message role="assistant" channel content 0123456789 '
# Ours are rendered to ids; a server that is sent text has to have some template, and none is exported (see `companions`).
TEMPLATE = """{%- for m in messages %}<|im_user|>{{ m.role }}<|im_middle|>{{ m.content }}<|im_end|>{%- endfor %}
{%- if tools %}{{ tools | tojson }}{%- endif %}
{%- if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{%- endif %}"""


@dataclass
class Server:
    """One child process. It can be killed and started again, on the same port."""

    name: str
    argv: list[str]
    log: Path
    env: dict[str, str] = field(default_factory=dict)
    port: int = 0
    running: str = ""  # in its /metrics: the gauge of requests that run, or a counter of tokens that moves while one does
    key: str = "none"
    patience_s: float = 240.0
    process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> float:
        """Seconds until it answered. Raises RuntimeError with its last words."""
        began = time.monotonic()
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self.argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                            env={**os.environ, **self.env}, start_new_session=True)  # fmt: skip
        while time.monotonic() - began < self.patience_s and self.process.poll() is None:
            if self.healthy():
                return time.monotonic() - began
            time.sleep(0.2)
        self.kill()
        words = self.log.read_text(errors="replace").splitlines()[-3:]
        raise RuntimeError(f"{self.name} did not start: {' | '.join(words)}")

    def healthy(self) -> bool:
        try:
            return httpx.get(self.url + "/health", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    def kill(self, how: int = signal.SIGKILL) -> None:
        """It and its children, which vLLM has several of."""
        if self.process is not None:
            try:
                os.killpg(self.process.pid, how)
            except ProcessLookupError:
                pass
            self.process.wait(60)
            self.process = None

    def idle(self) -> bool:
        """Whether it generates nothing now, by its own numbers."""
        before = self._number()
        if not self.running.endswith("_total"):
            return before == 0
        time.sleep(0.4)
        return self._number() == before

    def _number(self) -> float:
        text = httpx.get(self.url + "/metrics", timeout=5).text
        return sum(map(float, re.findall(rf"^{re.escape(self.running)}(?:{{[^}}]*}})? ([0-9.e+]+)$", text, re.M)))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# -- models -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Models:
    root: Path

    @property
    def run(self) -> Path:
        return self.root / "run"

    def checkpoint(self, name: str) -> Path:
        return self.run / "checkpoints" / name

    def hf(self, name: str) -> Path:
        return self.root / f"{name}-hf"

    def llama(self, name: str) -> Path:
        return self.root / f"llama-{name}-hf"

    @staticmethod
    def make(root: Path) -> Models:
        """A nano DeepSeek-V3 shape in our layout, Hugging Face's and GGUF, and a Llama shape, each twice with other weights,
        all with one tokenizer. The latent is 512 + 64 wide because vLLM's decoder for CPUs knows no other."""
        models = Models(root)
        tokenizer = BPETokenizer.train([TEXT * 5], 400)
        tokenizer.save(models.run / "tokenizer")
        template = RunDir(models.run).template()
        shape = dataclasses.replace(preset("nano-k2", tokenizer.vocab_size), kv_lora_rank=512, qk_rope_head_dim=64)
        for seed, name in enumerate(("first", "second")):
            save_checkpoint(models.checkpoint(name), _endless(TransformerLM(shape, seed=seed), template.stop_ids))
            convert(models.checkpoint(name), models.hf(name), "hf", tokenizer=models.run / "tokenizer")
            _llama_shape(models, name, seed)
        convert(models.checkpoint("first"), root / "first.gguf", "gguf", tokenizer=models.run / "tokenizer")
        (root / "template.jinja").write_text(TEMPLATE)
        return models


def _endless(model: Any, stops: Sequence[int]) -> Any:
    """So that answers last as long as they are let: the first coordinate of the residual stream stays what the embedding
    makes it, and speaks against every id that ends a turn."""
    for name, weight in model.state_dict().items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[0] = 0.0
        elif name.endswith("w_out"):  # of the experts, transposed
            weight[..., 0] = 0.0
        elif name.endswith("embed_tokens.weight"):
            weight[:, 0] = 0.1
        elif name.endswith("lm_head.weight"):
            weight[list(stops), 0] = -4.0
    return model


def _llama_shape(models: Models, name: str, seed: int) -> None:
    """With grouped heads and a cache of keys and values, which vLLM keeps prefixes of on a CPU."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    companions, target = models.hf(name), models.llama(name)
    torch.manual_seed(seed)

    data = json.loads((companions / "config.json").read_text())
    ids = {name: data[name] for name in ("vocab_size", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, head_dim=32,
                         num_key_value_heads=2, max_position_embeddings=CONTEXT, bos_token_id=None, **ids)  # fmt: skip
    model = _endless(LlamaForCausalLM(config), RunDir(models.run).template().stop_ids)
    model.save_pretrained(target)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        (target / file).write_bytes((companions / file).read_bytes())


# -- servers ----------------------------------------------------------------------------------------------------------


def vllm(python: Path, model: Path, root: Path, name: str, threads: int = 1) -> Server:
    """`python`: of an environment that has it. The token routes are there only with --enable-scale-out, cached tokens and
    times only when asked for, new weights only in what vLLM calls development mode. Our grammars name special tokens, which
    of its backends only guidance understands; with another a forced call ends in a 500."""
    port = free_port()
    argv = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", MODEL,
            "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager",
            "--max-model-len", str(CONTEXT), "--max-num-seqs", str(SLOTS), "--enable-scale-out",
            "--enable-prompt-tokens-details", "--enable-per-request-metrics", "--enable-auto-tool-choice",
            "--tool-call-parser", "hermes", "--structured-outputs-config", json.dumps({"backend": "guidance"}),
            "--chat-template", str(root / "template.jinja")]  # fmt: skip
    env = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_SERVER_DEV_MODE": "1",
           "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
           "OMP_NUM_THREADS": str(threads)}  # fmt: skip
    return Server(name, argv, root / f"{name.replace(' ', '-')}.log", env, port, "vllm:generation_tokens_total")


def llama(binary: Path, model: Path, root: Path) -> Server:
    port = free_port()
    argv = [str(binary), "-m", str(model), "--alias", MODEL, "--host", "127.0.0.1", "--port", str(port), "-t", "1",
            "-np", str(SLOTS), "-c", str(CONTEXT * SLOTS), "--metrics", "--no-webui", "--jinja", "--chat-template-file",
            str(root / "template.jinja")]  # fmt: skip
    return Server("llama.cpp", argv, root / "llama.log", {}, port, "llamacpp:requests_processing")


def sglang(python: Path, model: Path, root: Path) -> Server:
    port = free_port()
    argv = [str(python), "-m", "sglang.launch_server", "--model-path", str(model), "--served-model-name", MODEL,
            "--device", "cpu", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
            "--enable-metrics", "--enable-cache-report",
            "--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--context-length", str(CONTEXT),
            "--max-running-requests", str(SLOTS), "--chat-template", str(root / "template.jinja")]  # fmt: skip
    return Server("sglang", argv, root / "sglang.log", {"HF_HUB_OFFLINE": "1"}, port, "sglang:generation_tokens_total")


def tidelock(models: Models) -> Server:
    """Ours, over the first checkpoint."""
    Registry(models.run).release(models.checkpoint("first"))
    _, (secret, _) = books(models.run)
    return serve(models.run, "tidelock", secret, "--max-batch", str(SLOTS))


def serve(directory: Path, name: str, key: str, *options: str, **env: str) -> Server:
    port = free_port()
    argv = [sys.executable, "-m", "tidelock", "serve", str(directory), "--port", str(port), "--lenient",
            "--log", "json", "--exit-with-parent", str(os.getpid()), *options]  # fmt: skip
    env = {"OMP_NUM_THREADS": "1", **env}
    return Server(name, argv, directory / "log", env, port, "tidelock_generated_tokens_total", key)


def books(directory: Path) -> tuple[Database, tuple[str, str]]:
    """The service's database, open, and the secrets of an operator and of a customer with money."""
    (directory / "service").mkdir(exist_ok=True)
    db = Database(directory / "service" / "service.sqlite")
    keys = KeyStore.open(db, directory / "service" / "pepper")
    secrets = keys.create("house", role="admin")[1], keys.create("ann", training_consent=True)[1]
    for customer in ("house", "ann"):
        Ledger(db).topup(customer, 10**12)
    return db, secrets
