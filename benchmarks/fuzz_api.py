"""schemathesis on the published OpenAPI document, stateful, for as long as you like: no 5xx, no broken promise.

    python -m benchmarks.fuzz_api --seconds 120
    python -m benchmarks.fuzz_api --seconds 600 --lenient --seed 7 --database postgresql://…

The real application in front of a model that follows a script. Links in the document lead from what creates something
to what reads, changes and deletes it, so that sequences are walked and not only single requests. The key may do
everything a customer's key may. `tests/service/test_openapi.py` is the short form. Exits as schemathesis does.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
import tempfile
from pathlib import Path

from benchmarks.agent_script import AgentScript
from benchmarks.open_responses import answer
from tidelock.loop.rundir import MODEL, PRICES
from tidelock.service.accounts import SCOPES
from tidelock.service.openapi import document
from tidelock.service.server import serving
from tidelock.service.state import open_state
from tidelock.tokens.template import get_template
from tidelock.tokens.tokenizer import ByteTokenizer

CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "negative_data_rejection", "unsupported_method", "ignored_auth", "use_after_free", "ensure_resource_availability",
)  # fmt: skip
ENDLESS = "/v1/organization/receipts/stream"
SUMMARY = re.compile(r"Test cases|Operations|API Links|Seed|Errors|Failures|generated|covered|passed|failed", re.IGNORECASE)


async def fuzz(seconds: int, seed: int, lenient: bool, database: str | None) -> int:
    template = get_template("xtml", ByteTokenizer())
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "service"
        state = open_state(
            directory, policy=AgentScript(template, answer), template=template, prices=PRICES, model=MODEL,
            context_length=4096, weights_version=1, lenient=lenient, database=database,
        )  # fmt: skip
        _, key = state.keys.create("ann", scopes=SCOPES)
        state.ledger.topup("ann", 10**15)
        async with serving(state) as running:
            url = running.base_url.removesuffix("/v1") + "/openapi.json"
            command = [
                "-m", "schemathesis.cli", "run", url, "-H", f"Authorization: Bearer {key}", "--phases", "fuzzing,stateful",
                "--max-examples", "100000", "--max-time", str(seconds), "--seed", str(seed), "--no-color",
                "--continue-on-failure", "--checks", ",".join(CHECKS), "--exclude-path", ENDLESS,
            ]  # fmt: skip
            env = {**os.environ, "SCHEMATHESIS_HOOKS": ""}
            process = await asyncio.create_subprocess_exec(
                sys.executable, *command, cwd=scratch, env=env, stdout=asyncio.subprocess.PIPE
            )
            out, _ = await process.communicate()
        text = out.decode()
        sound = state.ledger.audit().sound
        state.traces.close()
        state.ledger.db.close()
    links = sum(len(op["responses"]["200"]["links"]) for path in document(MODEL)["paths"].values() for op in path.values())
    if process.returncode:
        print(text[-6000:])
    else:
        print("\n".join(line for line in text.splitlines()[-30:] if SUMMARY.search(line)))
    print(f"{links} links in the document; the ledger is {'sound' if sound else 'NOT SOUND'}; exit {process.returncode}")
    return process.returncode or int(not sound)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lenient", action="store_true")
    parser.add_argument("--database", help="a postgresql:// URL; SQLite otherwise")
    args = parser.parse_args()
    sys.exit(asyncio.run(fuzz(args.seconds, args.seed, args.lenient, args.database)))


if __name__ == "__main__":
    main()
