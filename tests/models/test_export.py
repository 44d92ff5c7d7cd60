"""An exported run: another implementation finds weights, tokenizer and stop ids without being told anything."""

import json
import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tidelock.engine import Engine  # noqa: E402
from tidelock.models import TransformerLM, preset, save_checkpoint  # noqa: E402
from tidelock.models.hf import convert  # noqa: E402
from tidelock.models.hf.gguf_vocab import read_vocabulary  # noqa: E402
from tidelock.tokens.policy import SamplingParams  # noqa: E402
from tidelock.tokens.tokenizer import BPETokenizer  # noqa: E402

TEXT = 'the tide turns: 12 boats, "née" <|im_end|> message role="user"\n\n  twice é🌊'


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    tokenizer = BPETokenizer.train([TEXT * 9, "def f(x):\n    return x + 1\n" * 9], 400)
    tokenizer.save(run / "tokenizer")
    model = TransformerLM(preset("nano-k2", -(-tokenizer.vocab_size // 16) * 16), seed=0)
    save_checkpoint(run / "checkpoints" / "a", model)
    return tokenizer, model, run, convert(run / "checkpoints" / "a", run / "hf")


def test_transformers_reads_the_tokenizer_as_ours(exported):
    transformers = pytest.importorskip("transformers")
    tokenizer, _, _, path = exported
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    plain = TEXT.replace("<|im_end|>", "")
    assert theirs(plain, add_special_tokens=False)["input_ids"] == tokenizer.encode(plain)
    for name in ("<|end_of_msg|>", "<|open|>", "</think>", "<|eod|>"):
        assert theirs.convert_tokens_to_ids(name) == tokenizer.special(name)
    ids = [*tokenizer.encode(plain), tokenizer.special("<|end_of_msg|>")]
    assert theirs.decode(ids, skip_special_tokens=True) == plain and theirs.eos_token_id == ids[-1]


def test_transformers_stops_where_the_engine_stops(exported):
    transformers = pytest.importorskip("transformers")
    import asyncio

    tokenizer, model, _, path = exported
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    ends = [tokenizer.special(name) for name in ("<|end_of_msg|>", "<|im_end|>")]
    assert theirs.generation_config.eos_token_id == ends and theirs.config.eos_token_id == ends[0]
    prompt = tokenizer.encode("the tide turns")
    with torch.no_grad():
        said = theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :].tolist()

    async def ours():
        engine = Engine(model.eval())
        try:
            params = SamplingParams(max_tokens=24, temperature=0.0, stop_ids=tuple(ends))
            return [i async for c in engine.generate(prompt, params) for i in c.ids]
        finally:
            engine.close()

    assert said == asyncio.run(ours())


def test_the_card_names_the_ids_and_the_way_back_changes_nothing(exported, tmp_path):
    tokenizer, model, run, path = exported
    assert f"(id {tokenizer.special('<|end_of_msg|>')})" in (path / "README.md").read_text()
    assert read_vocabulary(path, model.config.vocab_size) == read_vocabulary(run / "tokenizer", model.config.vocab_size)
    back = convert(path, tmp_path / "back", to="tidelock")
    again = BPETokenizer.load(back)
    assert again.identity == tokenizer.identity and again.vocab_size == tokenizer.vocab_size
    assert again.encode(TEXT) == tokenizer.encode(TEXT)  # and no text spells a special id
    assert tokenizer.special("<|im_end|>") not in again.encode(TEXT)


def test_a_foreign_checkpoints_own_files_are_kept(exported, tmp_path):
    *_, path = exported
    foreign = convert(path, tmp_path / "foreign")
    data = json.loads((foreign / "tokenizer.json").read_text())
    data["added_tokens"][0]["content"] = "<|theirs|>"
    (foreign / "tokenizer.json").write_text(json.dumps(data))
    (foreign / "chat_template.jinja").write_text("{{ messages }}")
    again = convert(foreign, tmp_path / "again", dtype="bfloat16")
    assert json.loads((again / "tokenizer.json").read_text()) == data
    assert (again / "chat_template.jinja").exists() and (again / "generation_config.json").exists()
