"""DSPy: its model. What it asks of one in words (typed outputs, its agents) is for a model that understands them."""

import dspy
import litellm
from case import GOOD, HI, MODEL, RECITE, URL, case, refusals, run


def lm(key=GOOD, name=MODEL):
    return dspy.LM(f"openai/{name}", api_key=key, api_base=f"{URL}/v1", max_tokens=4000, num_retries=0, cache=False)


@case
def plain():
    (said,) = lm()(HI)
    assert "Ann" in str(said)
    return said


@case
def usage():
    model = lm()
    model(HI)
    used = model.history[-1]["usage"]
    assert used["prompt_tokens"] > 0 and used["completion_tokens"] > 0
    return used


def ask(key, name, streamed):
    if streamed:
        said = [{"role": "user", "content": RECITE}]
        for _ in litellm.completion(f"openai/{name}", said, api_key=key, api_base=f"{URL}/v1", stream=True, num_retries=0):
            pass
        return
    lm(key, name)(RECITE)


refusals(ask)
run()
