"""Opening a service: what cannot keep its promises is refused before the first request."""

import pytest
from scripted import PRICE, ScriptedPolicy

from tidelock.service.prices import PriceBook
from tidelock.service.state import open_state
from tidelock.tokens.errors import UserError
from tidelock.tokens.template import get_template
from tidelock.tokens.tokenizer import ByteTokenizer


def test_a_template_that_forgets_is_not_served(tmp_path):
    """A conversation goes on from its stored ids; here it could not."""
    with pytest.raises(UserError, match="k2.5 template drops old reasoning"):
        open_state(
            tmp_path / "service", policy=ScriptedPolicy([]), template=get_template("k2.5", ByteTokenizer()),
            prices=PriceBook("v", {"m": PRICE}), model="m", context_length=100, weights_version=0,
        )  # fmt: skip
    assert not (tmp_path / "service").exists()
