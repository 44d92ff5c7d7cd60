"""A run directory and how its model is served: the tokenizer, the releases, the service's files.

PyTorch is imported where a model is: a service whose model runs elsewhere starts without it.

    tokenizer/  checkpoints/NAME/  releases.jsonl  service/{service.sqlite, trace.jsonl, pepper}  stages/  report.*
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tidelock.service.member import Member
from tidelock.service.prices import Price, PriceBook
from tidelock.service.state import ServiceState, open_state
from tidelock.tokens.errors import UserError
from tidelock.tokens.template import Template, get_template
from tidelock.tokens.tokenizer import load_tokenizer

from .registry import Registry

if TYPE_CHECKING:
    from tidelock.engine import Engine, Limits
    from tidelock.models import TransformerLM

MODEL = "tide-nano"
# Nano-USD per token: $0.30 / $0.03 / $1.50 per million.
PRICES = PriceBook("2026-11", {MODEL: Price(input_nano=300, cached_input_nano=30, output_nano=1500)})


class RunDir:
    """Paths and the things that lie at them."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.registry = Registry(self.path)
        self.service = self.path / "service"
        self.traces = self.service / "trace.jsonl"

    def existing(self) -> RunDir:
        if not self.path.is_dir():
            raise UserError(f"no run directory {self.path}; `tidelock demo --dir {self.path}` makes one")
        return self

    def checkpoint(self, name: str) -> Path:
        return self.path / "checkpoints" / name

    def template(self, name: str = "xtml") -> Template:
        return get_template(name, load_tokenizer(self.path / "tokenizer"))

    def load(self, checkpoint: Path) -> TransformerLM:
        from tidelock.models import load_checkpoint

        return load_checkpoint(checkpoint).eval()

    def engine(
        self, model: TransformerLM, template: Template, version: int = 0, limits: Limits | None = None,
        weights: str | None = None,
    ) -> Engine:  # fmt: skip
        from tidelock.engine import Engine, Limits

        return Engine(model, version, limits=limits or Limits(), boundary_id=template.stop_ids[0], weights=weights, template=template)

    def service_state(
        self, limits: Limits | None = None, weights: str | None = None, member: Member | None = None
    ) -> ServiceState:
        """The current release behind the service, its weights packed on request. The caller closes `state.policy`."""
        template, release = self.template(), self.registry.current()
        model = self.load(self.path / release.checkpoint)
        engine = self.engine(model, template, release.version, limits, weights)
        return open_state(
            self.service, policy=engine, template=template, prices=PRICES, model=MODEL,
            context_length=model.config.max_position_embeddings, weights_version=release.version, member=member,
            tells=knows_directives(self.path / release.checkpoint),
        )  # fmt: skip

    def upstreams(self, given: Path | None = None) -> Path | None:
        """The file that says who answers instead of an engine here: `given`, or `service/upstreams.toml` if there is one."""
        own = self.service / "upstreams.toml"
        return given or (own if own.exists() else None)

    def gateway_state(self, upstreams: Path, member: Member | None = None) -> ServiceState:
        """The service in front of other servers (`service.upstreams.config`). Of the release it needs the tokenizer and
        the context's length, and that only if `upstreams` does not say it; no model is loaded."""
        from tidelock.service.upstreams import read_upstreams

        template = self.template()
        front = read_upstreams(upstreams, template, workers=member.size if member else 1)
        return open_state(
            self.service, policy=front.pool, template=template, prices=PRICES, model=front.model or MODEL,
            context_length=front.context_length or self._context_length(), weights_version=-1, member=member,
            tells=front.directives,
        )  # fmt: skip

    def _context_length(self) -> int:
        file = self.path / self.registry.current().checkpoint / "config.json"
        try:
            return json.loads(file.read_text())["model"]["max_position_embeddings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"cannot read a context length from {file} ({error}); say context_length in [pool]") from None


def knows_directives(checkpoint: Path) -> bool:
    """Whether the model of a checkpoint can be told what its answer is held to. One that was trained here says so itself;
    one that comes from elsewhere was told in training, or reads English."""
    from tidelock.models import read_config

    extra = read_config(checkpoint)["extra"]
    return bool(extra.get("directives", "stage" not in extra))
