"""What of a conversation is trained: exactly the ids an assistant samples, after exactly the prompt it was shown."""

import pytest

from tidelock.tokens.errors import NotAnExtension
from tidelock.tokens.message import Message, ToolCall
from tidelock.tokens.template import canonical, get_template
from tidelock.tokens.tokenizer import ByteTokenizer
from tidelock.train.samples import conversation_sample

TASK = canonical([
    Message("user", "12 * 7?"),
    Message("assistant", "", "multiply", (ToolCall("", "calculator", {"expression": "12 * 7"}),)),
    Message("tool", "84"),
    Message("assistant", "84.", "done"),
])  # fmt: skip


@pytest.mark.parametrize("name", ["xtml", "chatml", "k2", "k2-thinking", "k2.5"])
def test_each_turn_is_trained_on_what_it_was_shown(name):
    t = get_template(name, ByteTokenizer())
    sample = conversation_sample(TASK, [False, True, False, True], t)
    trained = [list(ids) for ids in spans(sample)]
    assert trained == [t.sampled(TASK[1]), t.sampled(TASK[3])]
    for k in (1, 3):
        prompt = t.render(TASK[:k], generation_prompt=True)
        assert list(sample.ids)[: len(prompt)] == prompt


def spans(sample):
    """Runs of ids of weight 1."""
    out, last = [], 0.0
    for i, w in zip(sample.ids, sample.weights, strict=True):
        if w:
            out += [[]] if not last else []
            out[-1].append(int(i))
        last = w
    return out


def test_where_reasoning_is_forgotten_two_tasks_are_no_one_sample():
    two = canonical([*TASK, *TASK])
    conversation_sample(two, [True] * 8, get_template("k2.6", ByteTokenizer()))
    with pytest.raises(NotAnExtension):
        conversation_sample(two, [True] * 8, get_template("k2.5", ByteTokenizer()))
