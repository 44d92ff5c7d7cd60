"""What a server does for the books beside answering: say that it lives, settle the holds of those that died or timed
out, expire vouchers and plan credits. The start-up path is the recovery path."""

from __future__ import annotations

import asyncio
import logging

from tidelock.service import budget_rules, charges, detached, notices
from tidelock.service.db import StorageDown
from tidelock.service.state import ServiceState

log = logging.getLogger(__name__)


async def run(state: ServiceState) -> None:
    """Until cancelled. Heartbeats come at a third of the lease, sweeps at `sweep_interval_s`."""
    pause_s = min(state.worker.lease_s / 3, state.sweep_interval_s)
    since_sweep_s = 0.0
    while True:
        await asyncio.sleep(pause_s)
        since_sweep_s += pause_s
        try:
            await asyncio.to_thread(state.worker.beat)
            await asyncio.to_thread(flush, state)
            await asyncio.to_thread(recover, state)
            await asyncio.to_thread(state.traces.follow)
            if since_sweep_s >= state.sweep_interval_s:
                since_sweep_s = 0.0
                await asyncio.to_thread(sweep, state)
        except StorageDown as error:
            log.warning("upkeep waits for the database: %s", error)
        except Exception:
            log.exception("upkeep failed; it will try again")


async def slowly(state: ServiceState) -> None:
    """Until cancelled: what may take long or wait for others, beside the heartbeat and not before it. One that fails keeps
    none of the others."""
    db = state.ledger.db
    jobs = {
        "reconciliation": lambda: state.reconciler.tick(state.inexact),
        "automatic top-ups": lambda: charges.tick(state.ledger, state.provider),
        "notices": lambda: notices.deliver(db),
    }
    while True:
        await asyncio.sleep(min(state.sweep_interval_s, state.reconciler.every_s / 4))
        for name, job in jobs.items():
            try:
                await asyncio.to_thread(job)
            except StorageDown as error:
                log.warning("%s: waiting for the database: %s", name, error)
            except Exception:
                log.exception("%s failed; to be tried again", name)


def flush(state: ServiceState) -> None:
    """Writes what was only counted in memory. Raises StorageDown, and then it is kept for the next time."""
    state.tally.flush()
    state.refused.flush()
    state.keys.flush()


def recover(state: ServiceState) -> None:
    state.budgeted = budget_rules.in_force(state.ledger.db)
    dead = state.worker.dead()
    lost = state.ledger.recover(dead)
    if lost:
        log.warning("settled %d requests of servers that died", lost)
    detached.recover(state, dead)
    if dead != [""]:
        state.worker.forget(dead)


def sweep(state: ServiceState) -> None:
    lost = state.ledger.sweep(state.till.running)
    if lost:
        log.warning("settled %d requests whose holds expired", lost)
    state.plans.turn()
    state.ledger.expire_pockets()
    state.idempotency.sweep()
    state.ledger.prune(state.keep_holds_s)
    notices.sweep(state.ledger.db, state.ledger.clock())
    state.refused.sweep()
    detached.sweep(state.ledger.db, state.ledger.clock())


def leave(state: ServiceState) -> None:
    """Writes what is still queued; called when no request runs any more."""
    state.till.close()
    state.scribe.close()
    try:
        flush(state)
        state.worker.leave()
    except StorageDown as error:
        log.warning("could not sign off: %s", error)
