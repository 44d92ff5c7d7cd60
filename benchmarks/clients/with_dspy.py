"""DSPy: a signature, typed outputs, an agent with tools."""

import dspy
import litellm
from case import GOOD, HI, MODEL, PLACE, RECITE, URL, case, refusals, run
from pydantic import BaseModel


class Place(BaseModel):
    city: str
    degrees: int


class Fill(dspy.Signature):
    """Fill in the place."""

    question: str = dspy.InputField()
    place: Place = dspy.OutputField()


# it asks LiteLLM's list what a model can do, and of those that it does not list thinks that they know no schema
litellm.register_model({f"openai/{MODEL}": {"litellm_provider": "openai", "mode": "chat", "supports_response_schema": True,
                                           "supports_function_calling": True}})  # fmt: skip


def lm(key=GOOD, name=MODEL):
    return dspy.LM(f"openai/{name}", api_key=key, api_base=f"{URL}/v1", max_tokens=4000, num_retries=0, cache=False)


@case
def plain():
    (said,) = lm()(HI)
    assert "Ann" in str(said)
    return said


@case
def structured():
    """By a schema of its own making."""
    with dspy.context(lm=lm(), adapter=dspy.JSONAdapter()):
        return dspy.Predict(Fill)(question=PLACE).place


@case
def usage():
    with dspy.context(lm=lm(), adapter=dspy.JSONAdapter(), track_usage=True):
        used = dspy.Predict(Fill)(question=PLACE).get_lm_usage()
    assert used
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
