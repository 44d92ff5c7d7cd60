"""Answers batches, a few lines at a time, through the same code as live requests.

Every line's result is stored in the transaction that charges for it, so a batch that was interrupted anywhere goes on
where it was.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Any

from tidelock.service import batch_queue, run, wire
from tidelock.service.access import background
from tidelock.service.answer import Ended, Event
from tidelock.service.db import StorageDown
from tidelock.service.errors import ApiError
from tidelock.service.http import as_api_error
from tidelock.service.record import current
from tidelock.service.run import Turn
from tidelock.service.state import ServiceState
from tidelock.service.surfaces import batches, files, message_batches
from tidelock.service.surfaces.chat import Chat
from tidelock.service.surfaces.messages import Messages
from tidelock.service.surfaces.responses import Responses
from tidelock.tokens import jsontext

log = logging.getLogger(__name__)

SURFACES = {"/v1/chat/completions": Chat, "/v1/responses": Responses, message_batches.ENDPOINT: Messages}
LINE = "batch_line"
MAX_LINES = 50_000
MAX_ERRORS = 50  # listed of a file that does not validate
AT_A_TIME = 8
POLL_S = 5.0
TELL_S = 0.2  # between two tellings of how far a batch is
PENANCE_S = 60.0  # a batch that fails, which none should, waits so long and holds up nobody
RETRY_S = (0.1, 0.5, 2, 10, 30, 60)  # before a line is asked again of an engine that was busy


async def work(state: ServiceState) -> None:
    """Runs until cancelled."""
    while True:
        try:
            claimed = batch_queue.claim(state.ledger.db, state.batch_lease_s)
            if claimed is None:
                state.batch_news.clear()
                await _news(state)
                continue
            await _one(state, *claimed)
        except Exception:
            log.exception("the batch worker failed; it will try again")
            await asyncio.sleep(POLL_S)


async def _news(state: ServiceState) -> None:
    try:
        async with asyncio.timeout(min(POLL_S, state.batch_lease_s)):
            await state.batch_news.wait()
    except TimeoutError:
        pass


async def _one(state: ServiceState, batch_id: str, customer: str, key_id: str) -> None:
    keeper = asyncio.create_task(_keep(state, batch_id))
    batch = _Batch(state, batch_id, customer, key_id)
    try:
        await batch.run()
        batch_queue.remove(state.ledger.db, batch_id)
    except Paused:
        log.info("%s waits: its organisation is suspended", batch_id)
        batch_queue.renew(state.ledger.db, batch_id, 0)
    except (StorageDown, asyncio.CancelledError):
        batch_queue.renew(state.ledger.db, batch_id, 0)
        raise
    except Exception:
        log.exception("%s failed; to be tried again after others have had their turn", batch_id)
        if not batch.given_up():
            batch_queue.renew(state.ledger.db, batch_id, PENANCE_S)
        else:
            batch_queue.remove(state.ledger.db, batch_id)
    finally:
        keeper.cancel()


async def _keep(state: ServiceState, batch_id: str) -> None:
    while True:
        await asyncio.sleep(state.batch_lease_s / 3)
        batch_queue.renew(state.ledger.db, batch_id, state.batch_lease_s)


class Paused(Exception):
    """Its organisation is suspended: what was answered is kept, and the rest is for when that is lifted."""


class _Batch:
    def __init__(self, state: ServiceState, batch_id: str, customer: str, key_id: str) -> None:
        self.state, self.id, self.customer = state, batch_id, customer
        self.key_id = key_id
        self._telling, self._tell_again = asyncio.Lock(), 0.0
        ours = not batch_id.startswith(message_batches.PREFIX)
        self.kind, self.file_kind = (batches.KIND, files.KIND) if ours else (message_batches.KIND, message_batches.INPUT)

    async def run(self) -> None:
        doc = self._doc()
        if doc["status"] in batches.OVER:  # its worker died before it left the queue, and its lines are gone from the table:
            return  # they would be asked, and charged, again
        lines, faults = await asyncio.to_thread(self._lines, doc)
        if faults:
            self._change(status="failed", failed_at=int(time.time()), errors={"object": "list", "data": faults})
            return
        done = {doc["line"]: doc for doc in self.state.objects.under(LINE, self.customer, self.id)}

        def begin(doc: dict[str, Any]) -> None:
            doc.update(in_progress_at=doc["in_progress_at"] or int(time.time()), request_counts=_counts(len(lines), done.values()))
            if doc["status"] != "cancelling":  # it may have been cancelled while its lines were read
                doc["status"] = "in_progress"

        self.state.objects.change(self.kind, self.customer, self.id, begin)
        await self._answer(doc, lines, done)
        await asyncio.to_thread(self._finish, len(lines), done)

    def given_up(self) -> bool:
        """Whether its time is over, and it is failed for good."""
        if time.time() < self._doc()["expires_at"]:
            return False
        error = _fault(None, "internal_error", "the server failed on this batch")
        self._change(status="failed", failed_at=int(time.time()), errors={"object": "list", "data": [error]})
        return True

    def _doc(self) -> dict[str, Any]:
        return self.state.objects.get(self.kind, self.customer, self.id)

    def _change(self, **fields: Any) -> dict[str, Any]:
        return self.state.objects.change(self.kind, self.customer, self.id, lambda doc: doc.update(fields))

    def _lines(self, doc: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """(requests, what is wrong with the file)."""
        lines: list[dict[str, Any]] = []
        faults: list[dict[str, Any]] = []
        seen: set[str] = set()
        try:
            text = files.path_of(self.state, doc["input_file_id"]).read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            return [], [_fault(None, "invalid_file", f"the input file cannot be read: {type(error).__name__}")]
        for n, line in enumerate(text.split("\n"), 1):  # and not at U+2028 and its like, which JSON strings may hold
            if not line.strip():
                continue
            try:
                request = jsontext.load(line)  # its halves of characters could not be written into the results
                fault = _line_fault(request, doc["endpoint"], seen)
            except ValueError:
                request, fault = None, ("invalid_json_line", "the line is not JSON")
            if fault is None:
                lines.append(request)
            elif len(faults) < MAX_ERRORS:
                faults.append(_fault(n, *fault))
        if not lines and not faults:
            faults.append(_fault(None, "empty_file", "the input file has no requests"))
        if len(lines) > MAX_LINES:
            faults.append(_fault(None, "too_many_requests", f"at most {MAX_LINES} requests in a batch"))
        return lines, faults

    async def _answer(self, doc: dict[str, Any], lines: list[dict[str, Any]], done: dict[int, Any]) -> None:
        """Fills `done`, until all are or the batch is cancelled or expired. Raises Paused once no line is being answered."""
        waiting = [n for n in range(len(lines)) if n not in done][::-1]
        paused = False

        async def some() -> None:
            nonlocal paused
            while not paused and not await asyncio.to_thread(self._over):
                if not waiting:  # others may have taken the last one meanwhile
                    return
                n = waiting.pop()
                try:
                    done[n] = await self._line(doc["endpoint"], lines[n], n)
                except Paused:
                    paused = True
                    return
                await self._progress(len(lines), done)

        tasks = [asyncio.create_task(some()) for _ in range(AT_A_TIME)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if paused and not await asyncio.to_thread(self._over):
            raise Paused

    async def _progress(self, total: int, done: dict[int, Any]) -> None:
        """Tells of it now and then: to count fifty thousand lines after each of them would keep everybody waiting."""
        if time.monotonic() >= self._tell_again:
            self._tell_again = time.monotonic() + TELL_S
            async with self._telling:  # in order
                await asyncio.to_thread(self._change, request_counts=_counts(total, done.values()))

    def _over(self) -> bool:
        doc = self._doc()
        return doc["status"] == "cancelling" or time.time() >= doc["expires_at"]

    async def _line(self, endpoint: str, line: dict[str, Any], n: int) -> dict[str, Any]:
        """The stored result. An answer is stored by the transaction that charges for it: a line that is billed is never
        asked again, and one that is not billed was never answered."""
        for pause_s in (*RETRY_S, None):
            try:
                with background(self.state, "batch", self.customer, self.key_id) as record:
                    result = await self._attempt(endpoint, line, n, record.request_id, last=pause_s is None)
                    record.status = result["response"]["status_code"]
                    return result
            except ApiError as busy:
                log.info("%s, line %d waits: %s", self.id, n, busy.code or busy.kind)
                await asyncio.sleep(pause_s)
        raise AssertionError("the last attempt returns")

    async def _attempt(
        self, endpoint: str, line: dict[str, Any], n: int, request_id: str, *, last: bool
    ) -> dict[str, Any]:
        """Raises ApiError if the engine was busy and this was not the last attempt, Paused."""

        def result(status: int, body: Any) -> dict[str, Any]:
            response = {"status_code": status, "request_id": request_id, "body": body}
            return {"id": f"{self.id}/{n}", "line": n, "custom_id": line["custom_id"], "response": response, "error": None}

        stored: list[dict[str, Any]] = []
        try:
            translation, turn = await self._turn(endpoint, wire.encode(line["body"]), request_id)

            def store(execute: Any, events: list[Event], failed: ApiError | None) -> None:
                ended = [event for event in events if isinstance(event, Ended)]
                stored[:] = [result(200, json.loads(wire.encode(translation.whole(ended, events[-1]))))]
                self.state.objects.put_in(execute, LINE, self.customer, stored[0])

            await run.whole(self.state, turn, asyncio.Event(), store)
        except Paused:
            if (now := current()) is not None:  # what the access line says of a line that waits
                now.status = 403
                now.failed("organization_suspended")
            raise
        except Exception as exception:
            error = as_api_error(exception, request_id)
            if error.retry_after_s is not None and not last:
                raise error from exception
            self.state.tally.refused(self.state.model, error)
            anthropic = SURFACES[endpoint].anthropic
            stored[:] = [result(error.status, error.anthropic(request_id)[1] if anthropic else error.body())]
            self.state.objects.put(LINE, self.customer, stored[0])
        return stored[0]

    async def _turn(self, endpoint: str, body: bytes, request_id: str) -> tuple[Any, Turn]:
        state, key = self.state, self.state.keys.live(self.key_id)
        if key is None or "model" not in key.scopes:
            raise ApiError(401, "invalid_authentication_error", "the key that made this batch is revoked")
        if key.suspended:
            raise Paused
        if key.budgeted:
            state.budgeted = True  # as `auth` does: until the heartbeat says otherwise
        translation = SURFACES[endpoint](state, key, None, body)
        if not translation.anthropic:
            translation.request.store = False  # the batch's own file keeps it
        for field, asked in (("stream", translation.ask.stream), ("background", translation.ask.apart)):
            if asked:
                raise ApiError(400, "invalid_request_error", f"a request in a batch cannot be one with {field}", param=field)
        turn = await run.prepare(state, key, translation.ask, request_id, "batch")
        translation.begin(turn)
        return translation, turn

    def _finish(self, total: int, done: dict[int, Any]) -> None:
        doc = self._change(finalizing_at=int(time.time()))
        good = [done[n] for n in sorted(done) if done[n]["response"]["status_code"] == 200]
        bad = [done[n] for n in sorted(done) if done[n]["response"]["status_code"] != 200]
        output, error = self._file("output", good), self._file("error", bad)
        if doc["status"] == "cancelling":
            status = "cancelled"
        else:
            status = "completed" if len(done) == total else "expired"
        now = int(time.time())
        self._change(
            status=status, output_file_id=output, error_file_id=error, request_counts=_counts(total, done.values()),
            **{f"{status}_at": now},
        )  # fmt: skip
        self.state.objects.delete_under(LINE, self.customer, self.id)

    def _file(self, which: str, results: list[dict[str, Any]]) -> str | None:
        """The same file however often the end of a batch is begun."""
        if not results:
            return None
        rows = [
            {"id": "batch_req_" + r["response"]["request_id"].removeprefix("req_"), "custom_id": r["custom_id"],
             "response": r["response"], "error": r["error"]}
            for r in results
        ]  # fmt: skip
        file_id = f"file-{which}-{self.id}"
        try:
            self.state.objects.get(self.file_kind, self.customer, file_id)
        except ApiError:
            data = b"".join(wire.encode(row) + b"\n" for row in rows)
            files.store(self.state, self.customer, f"{self.id}_{which}.jsonl", "batch_output", data, file_id,
                        self.file_kind)  # fmt: skip
        return file_id


def _counts(total: int, results: Any) -> dict[str, int]:
    completed = sum(1 for result in results if result["response"]["status_code"] == 200)
    return {"total": total, "completed": completed, "failed": len(results) - completed}


def _line_fault(request: Any, endpoint: str, seen: set[str]) -> tuple[str, str] | None:
    if not isinstance(request, dict) or not isinstance(request.get("custom_id"), str):
        return "missing_custom_id", "every line needs a custom_id"
    if request["custom_id"] in seen:
        return "duplicate_custom_id", f"custom_id {request['custom_id']!r} repeats"
    seen.add(request["custom_id"])
    if request.get("method", "POST") != "POST" or request.get("url") != endpoint:
        return "mismatched_endpoint", f"method and url must be POST {endpoint}"
    if not isinstance(request.get("body"), dict):
        return "invalid_body", "every line needs a body"
    return None


def _fault(line: int | None, code: str, message: str) -> dict[str, Any]:
    return {"code": code, "line": line, "message": message, "param": None}
