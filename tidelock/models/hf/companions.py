"""What lies beside the weights of an exported model: tokenizer, generation settings, and a word on the chat format.

With these, `AutoTokenizer`, `AutoModelForCausalLM`, vLLM and SGLang load the directory as it is. There is no Jinja chat
template: a template that works on text lets a user's text become control tokens, so prompts are rendered to ids.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tidelock.tokens.tokenizer import SPECIALS

END_OF_TURN = ("<|end_of_msg|>", "<|im_end|>")  # of the XTML and the ChatML template
OTHERS = ("tokenizer*", "tiktoken.model", "special_tokens_map.json", "generation_config.json", "chat_template*")

CARD = """# {name}

A Tidelock model in the published {layout} layout: weights in safetensors, tokenizer, generation settings.

- transformers: `AutoModelForCausalLM.from_pretrained(DIR)`, `AutoTokenizer.from_pretrained(DIR)`
- vLLM, SGLang: serve DIR as it is (the `kimi_k3` layout needs a version that knows that model)
- llama.cpp: `tidelock models convert DIR model.gguf --to gguf`

There is no chat template in here. Tidelock renders conversations to token ids, so that no text which a user can type
becomes a control token; send ids (`/inference/v1/generate`, `prompt` as a list) instead of chat messages, or put a
Tidelock server in front. A turn ends with {ends}.
"""


def write_companions(target: Path, source: Path, tokenizer: Path | None, name: str, layout: str) -> None:
    """Into the exported directory `target`: our tokenizer in Hugging Face's files, or else the files of a foreign one."""
    if tokenizer is not None and is_ours(tokenizer / "tokenizer.json"):
        ends = _write_ours(target, tokenizer / "tokenizer.json")
        card = CARD.format(name=name, layout=layout, ends=" or ".join(f"`{text}` (id {i})" for text, i in ends.items()))
        (target / "README.md").write_text(card)
        return
    for place in dict.fromkeys((tokenizer or source, source)):
        copy_files(place, target)


def copy_files(source: Path, target: Path) -> None:
    for pattern in OTHERS:
        for file in source.glob(pattern):
            if file.is_file() and not (target / file.name).exists():
                shutil.copy(file, target / file.name)


def is_ours(file: Path) -> bool:
    """Whether a tokenizer.json is one of ours, whose special tokens our wrapper keeps out of the library's reach."""
    try:
        data = json.loads(file.read_text())
        return data["model"]["type"] == "BPE" and not data.get("added_tokens")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_ours(target: Path, file: Path) -> dict[str, int]:
    data = json.loads(file.read_text())
    base = len(data["model"]["vocab"])
    ids = {name: base + i for i, name in enumerate(SPECIALS)}
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    data["added_tokens"] = [{"id": i, "content": name, **plain} for name, i in ids.items()]
    (target / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False))
    _json(target / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TURN[0], "pad_token": "<|eod|>",
        "clean_up_tokenization_spaces": False, "add_bos_token": False, "add_eos_token": False,
    })  # fmt: skip
    _json(target / "special_tokens_map.json", {"eos_token": END_OF_TURN[0], "pad_token": "<|eod|>"})
    ends = {name: ids[name] for name in END_OF_TURN}
    _json(target / "generation_config.json", {"eos_token_id": list(ends.values()), "pad_token_id": ids["<|eod|>"], "do_sample": True,
                                              "temperature": 1.0, "top_p": 1.0})  # fmt: skip
    config = json.loads((target / "config.json").read_text())
    config.get("text_config", config).update(eos_token_id=ids[END_OF_TURN[0]], pad_token_id=ids["<|eod|>"])
    _json(target / "config.json", config)
    return ends


def _json(file: Path, data: dict) -> None:
    file.write_text(json.dumps(data, indent=1) + "\n")
