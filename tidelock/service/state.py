"""What the running service holds in its hands: one policy, one template, one trace store, one ledger."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tidelock.service.db import Database
from tidelock.service.keys import KeyStore
from tidelock.service.ledger import Ledger
from tidelock.service.metrics import Metrics, Observed
from tidelock.service.prices import Price, PriceBook
from tidelock.tokens.errors import UserError
from tidelock.tokens.policy import Policy
from tidelock.tokens.template import Template
from tidelock.tokens.trace import TraceStore


@dataclass
class ServiceState:
    policy: Policy
    template: Template
    traces: TraceStore
    ledger: Ledger
    keys: KeyStore
    prices: PriceBook
    model: str  # the name clients ask for
    context_length: int
    weights_version: int
    default_max_tokens: int = 256
    request_timeout_s: float = 600.0
    sweep_interval_s: float = 30.0
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        self.policy = Observed(self.policy, self.metrics, self.weights_version)
        if self.model not in self.prices.prices:
            raise UserError(f"the price book {self.prices.version!r} has no price for model {self.model!r}")

    @property
    def price(self) -> Price:
        return self.prices.prices[self.model]

    @property
    def hold_lifetime_s(self) -> float:
        """Longer than any request may take, so only the holds of dead requests ever expire."""
        return self.request_timeout_s + 60.0


def open_state(
    directory: str | Path,
    *,
    policy: Policy,
    template: Template,
    prices: PriceBook,
    model: str,
    context_length: int,
    weights_version: int,
    **options: float,
) -> ServiceState:
    """Opens (or creates) the service's files in `directory`: `service.sqlite`, `pepper` and `trace.jsonl`.

    Raises UserError for a template that would have to render a stored conversation anew to go on with it.
    """
    if not template.prefix_stable:
        raise UserError(
            f"the {template.name} template drops old reasoning, so stored conversations could not be continued by their "
            "ids; serve with one that keeps it, such as chatml"
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    db = Database(directory / "service.sqlite")
    prices.register(db)
    return ServiceState(
        policy=policy,
        template=template,
        traces=TraceStore(directory / "trace.jsonl", template, patience_s=10.0),
        ledger=Ledger(db),
        keys=KeyStore.open(db, directory / "pepper"),
        prices=prices,
        model=model,
        context_length=context_length,
        weights_version=weights_version,
        **options,
    )
