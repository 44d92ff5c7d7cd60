"""What the running service holds in its hands: one policy, one template, one trace store, one ledger."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidelock.service.accounts import Accounts
from tidelock.service.charges import HttpProvider, Provider
from tidelock.service.db import Database, service_database
from tidelock.service.member import Member
from tidelock.service.guesses import Guesses
from tidelock.service.idempotency import Idempotency
from tidelock.service.keys import KeyStore
from tidelock.service.ledger import Ledger
from tidelock.service.logs import AccessLog
from tidelock.service.metrics import Metrics, Observed
from tidelock.service.objects import Objects
from tidelock.service.payments import Payments
from tidelock.service.plans import Plans
from tidelock.service.pricefile import read_prices
from tidelock.service.prices import PriceBook, Schedule
from tidelock.service.reconciliation.job import Job
from tidelock.service.refused import Refused
from tidelock.service.scribe import Scribe
from tidelock.service.tally import Tally
from tidelock.service.tiers import Tiers
from tidelock.service.till import Till
from tidelock.service.workers import Worker
from tidelock.tokens.errors import UserError
from tidelock.tokens.policy import Policy
from tidelock.tokens.template import Template
from tidelock.tokens.siblings import journal_of
from tidelock.tokens.trace import TraceStore

if TYPE_CHECKING:
    from tidelock.service.detached import Running
    from tidelock.service.tracing import Tracing  # needs the `otel` extra


@dataclass
class ServiceState:
    policy: Policy
    template: Template
    traces: TraceStore
    scribe: Scribe  # writes them
    ledger: Ledger
    till: Till  # the ledger, for running requests
    worker: Worker
    idempotency: Idempotency
    keys: KeyStore
    accounts: Accounts
    tiers: Tiers
    plans: Plans
    payments: Payments
    provider: Provider | None  # who charges for automatic top-ups
    webhook_secrets: Path  # one a line; without the file no event is believed
    prices: Schedule
    objects: Objects
    tally: Tally  # of refusals and computing time
    refused: Refused  # requests, one by one
    files: Path  # what clients uploaded
    model: str  # the name clients ask for
    context_length: int
    weights_version: int
    default_max_tokens: int = 256
    request_timeout_s: float = 600.0
    sweep_interval_s: float = 30.0
    keep_holds_s: float = 30 * 86400.0  # after they were closed; a few are removed with every sweep
    keep_alive_s: float = 10.0  # a stream says something at least this often
    budgeted: bool = False  # somebody has a budget, as of the last heartbeat
    merge_s: float = 0.01  # a stream is written to at most this often
    stall_timeout_s: float = 60.0  # a client that takes nothing for this long has left
    max_body_bytes: int = 32 << 20
    batch_lease_s: float = 30.0  # a batch whose worker died goes on after this
    batch_news: asyncio.Event = field(default_factory=asyncio.Event)
    guesses: Guesses = field(default_factory=Guesses)
    detached: dict[str, Running] = field(default_factory=dict)  # answers that go on without their client, by id
    stopper: asyncio.Task[None] | None = None  # looks which of them are to be stopped
    member: Member | None = None  # of a server with several workers
    tells: bool = True  # a model that knows directives is told what it is held to (see `forcing.told`)
    lenient: bool = False  # see `kimi`: False holds clients to Kimi's contract to the letter
    metrics: Metrics = field(default_factory=Metrics)
    access_log: AccessLog | None = None  # None: no access lines
    tracing: Tracing | None = None

    def __post_init__(self) -> None:
        self.reconciler = Job(self.ledger.db, self.worker.id, self.traces.journal, self.metrics)
        self.policy = Observed(self.policy, self.metrics, self.weights_version)
        self.prices.now.price(self.model)

    def inexact(self, upstream: str) -> bool:
        """Whether an upstream counts other tokens than we do, so that its counts can only be compared in sum."""
        named = getattr(self.policy, "inexact", None)  # a pool knows it of each
        return named(upstream) if named else not self.policy.exact

    @property
    def hold_lifetime_s(self) -> float:
        """Longer than any request may take, so only the holds of dead requests ever expire."""
        return self.request_timeout_s + 60.0


def open_state(
    directory: str | Path,
    *,
    policy: Policy,
    template: Template,
    prices: PriceBook | Schedule,
    model: str,
    context_length: int,
    weights_version: int,
    database: str | None = None,
    member: Member | None = None,
    **options: Any,
) -> ServiceState:
    """Opens (or creates) the service's files in `directory`: `service.sqlite`, `pepper` and `trace.jsonl`.

    Files a founder may put there: `database`, one line with a `postgresql://` URL, for several workers or machines;
    `prices.toml`, the price book (`pricefile`), which then counts instead of `prices`; `webhook_secrets`, what the
    payment provider signs with; and `payment_provider`, its URL and our secret there, for automatic top-ups. `database`
    overrides the first. `member`: which worker of a server that has several; each writes a journal of its own
    (`tokens.siblings`).
    Raises UserError for a template that would have to render a stored conversation anew to go on with it.
    """
    if not template.prefix_stable:
        raise UserError(
            f"the {template.name} template drops old reasoning, so stored conversations could not be continued by their "
            "ids; serve with one that keeps it, such as chatml"
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    db = Database(database or service_database(directory))
    schedule = Schedule((prices,)) if isinstance(prices, PriceBook) else prices
    if (directory / "prices.toml").is_file():
        schedule = read_prices(directory / "prices.toml")
    schedule.register(db)
    worker = Worker(db)
    traces = TraceStore(journal_of(directory, member.number if member else 0), template, patience_s=10.0)
    return ServiceState(
        policy=policy,
        template=template,
        traces=traces,
        scribe=Scribe(traces),
        ledger=(ledger := Ledger(db, worker=worker.id)),
        till=Till(db, worker=worker.id),
        worker=worker,
        idempotency=Idempotency(db, worker.id),
        keys=KeyStore.open(db, directory / "pepper"),
        accounts=Accounts(db),
        tiers=Tiers(db),
        plans=Plans(ledger),
        payments=Payments(ledger),
        provider=HttpProvider.read(directory / "payment_provider"),
        webhook_secrets=directory / "webhook_secrets",
        prices=schedule,
        objects=Objects(db),
        tally=Tally(db),
        refused=Refused(db),
        files=directory / "files",
        model=model,
        context_length=context_length,
        weights_version=weights_version,
        member=member,
        **options,
    )
