"""The doctor where the model runs elsewhere: what it can examine it does, and says how much it cannot."""

from tidelock.loop import doctor
from tidelock.loop.registry import Registry
from tidelock.loop.rundir import RunDir
from tidelock.models import TransformerLM, preset, save_checkpoint
from tidelock.tokens.message import Message
from tidelock.tokens.tokenizer import BPETokenizer
from tidelock.tokens.trace import Node, TraceStore


def gateway(tmp_path, version: int) -> RunDir:
    """A run directory with one conversation, of which an upstream sampled the answer by such weights."""
    BPETokenizer.train(["tides and moons"], 300).save(tmp_path / "tokenizer")
    run = RunDir(tmp_path)
    template = run.template()
    question, said = Message("user", "tides"), Message("assistant", "moons")
    common = {"scope": "s", "template": template.hash, "sandbox": "none", "consent": True, "consent_source": "x"}
    asked = Node.of(None, question, template.render([question]), **common)
    ids = template.render([question, said])[len(asked.ids) :]
    sampled = len(ids) - len(template.generation_prompt())
    answer = Node.of(asked.id, said, ids, sampled=sampled, logprobs=(-1.0,) * sampled, exact=True, finish_reason="stop",
                     weights_versions=((version, sampled),), **common)  # fmt: skip
    run.service.mkdir()
    store = TraceStore(run.traces, template)
    store.add_many([asked, answer])
    store.close()
    return run


def test_what_an_upstream_sampled_is_counted_and_everything_else_examined(tmp_path):
    run = gateway(tmp_path, 7)  # of a Tidelock that knows its versions; here nothing was released
    findings = doctor.examine(run)
    assert findings.healthy and findings.sessions == 1 and findings.sampled_tokens == 0 < findings.sampled_elsewhere


def test_an_unknown_version_is_nobody_s_here_either_though_there_are_releases(tmp_path):
    run = gateway(tmp_path, -1)
    vocabulary = run.template().tokenizer.vocab_size
    save_checkpoint(run.checkpoint("first"), TransformerLM(preset("nano-k3", vocabulary)))
    Registry(tmp_path).release(run.checkpoint("first"))
    findings = doctor.examine(run)
    assert findings.healthy and findings.sampled_tokens == 0 < findings.sampled_elsewhere
