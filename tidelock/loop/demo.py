"""One turn of the loop, whole: from nothing to a served model, its users, and the better model they led to.

Each stage is a function from the run directory to a small dict of figures. `run_demo` calls them in order; a stage that
finished is skipped on the next start.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tidelock.agent import Agent
from tidelock.engine import Limits
from tidelock.envs.registry import FAMILIES, names_of, tasks
from tidelock.envs.run import Scored, run_tasks
from tidelock.envs.task import Task
from tidelock.models import TransformerLM, preset, save_checkpoint
from tidelock.remote import Client
from tidelock.remote.sse import Endpoint
from tidelock.sandbox import ToolHost
from tidelock.service.db import Database, service_database
from tidelock.service.keys import KeyStore
from tidelock.service.ledger import Ledger
from tidelock.tokens.policy import SamplingParams
from tidelock.tokens.trace import Trace
from tidelock.train.corpus import read_texts, stdlib_files, user_files
from tidelock.train.loop import Recipe, train
from tidelock.train.objectives import cross_entropy
from tidelock.train.packing import Sample, stream
from tidelock.train.rl import RLRecipe, reinforce

from . import doctor
from .console import Console
from .curriculum import finetuning, pretraining, train_tokenizer
from .dataset import balanced, build, successes
from .figures import assemble, example, summarise, thin
from .gate import decide
from .report import write_report
from .rundir import MODEL, RunDir
from .server_process import served
from .settings import DemoSettings
from .stages import Stages
from .users import Asked, Customer, Office, together

TOOLSET = "tidelock.envs.toolset:TOOLSET"
BUDGET_NANO = 50_000_000_000  # 50 USD per customer


@dataclass
class Demo:
    """What every stage needs."""

    run: RunDir
    settings: DemoSettings
    console: Console

    # -- before anybody uses it ---------------------------------------------------------------------------------------

    def texts(self) -> list[str]:
        s = self.settings
        files = stdlib_files()
        random.Random(s.seed).shuffle(files)
        own = user_files(Path(s.text)) if s.text else []
        return [*read_texts(own, s.text_bytes), *read_texts(files, s.text_bytes)]

    def tokenizer(self) -> dict:
        s = self.settings
        with self.console.status("tokenizer"):
            texts = self.texts()[:60]
            tokenizer = train_tokenizer(texts, names_of("base"), s.vocab_size, s.seed)
            tokenizer.save(self.run.path / "tokenizer")
        return {"vocab_size": tokenizer.vocab_size, "tokens": 0}

    def pretrain(self) -> dict:
        s, template = self.settings, self.run.template()
        vocab = -(-template.tokenizer.vocab_size // 16) * 16
        model = TransformerLM(preset(s.preset, vocab), seed=s.seed)
        model.start_head_from_embedding()
        samples = pretraining(
            self.texts(), names_of("base"), template, text_share=s.text_share, length=s.text_piece, seed=s.seed
        )
        return self._train("pretrain", model, samples, s.pretrain, s.tokens_per_step)

    def sft(self) -> dict:
        s = self.settings
        model = self.run.load(self.run.checkpoint("pretrain"))
        samples = finetuning(names_of("base"), self.run.template(), s.seed + 1)
        return self._train("sft", model, samples, s.sft, s.sft_tokens_per_step)

    def _train(self, name: str, model: TransformerLM, samples: Iterator[Sample], recipe: Recipe, per_step: int) -> dict:
        packs = stream(samples, per_step)
        with self.console.progress(name, recipe.steps, "steps") as bar:
            curve = train(model, packs, recipe, cross_entropy, lambda i, f: bar.advance(1, loss=f["loss"]))
        save_checkpoint(self.run.checkpoint(name), model, {"stage": name, "recipe": recipe.__dict__})
        return {"tokens": curve[-1]["tokens"], "curve": thin(curve)}

    def rl(self) -> dict:
        s, base = self.settings, names_of("base")
        model, template = self.run.load(self.run.checkpoint("sft")), self.run.template()
        pools = {name: tasks(name, "rl", s.seed, s.rl_prompts * s.rl_iterations) for name in base}

        def draw(i: int) -> list[Task]:
            return [t for name in base for t in pools[name][i * s.rl_prompts : (i + 1) * s.rl_prompts]]

        async def work() -> list[dict]:
            host = await ToolHost.start(TOOLSET)
            engine = self.run.engine(model, template, limits=Limits(max_batch=s.concurrency))
            agent = Agent(engine, template, SamplingParams(max_tokens=s.max_tokens))
            recipe = RLRecipe(s.rl_iterations, s.rl_prompts, s.rl_group, s.rl)
            try:
                with self.console.progress("rl", s.rl_iterations, "iterations") as bar:
                    return await reinforce(model, engine, agent, host, draw, recipe, s.seed,
                                           lambda i, f: bar.advance(1, reward=f["reward"]))  # fmt: skip
            finally:
                engine.close()
                await host.stop()

        curve = asyncio.run(work())
        save_checkpoint(self.run.checkpoint("rl"), model, {"stage": "rl"})
        return {"tokens": sum(c["tokens"] for c in curve), "curve": curve}

    # -- serving and using --------------------------------------------------------------------------------------------

    def serve(self) -> dict:
        """Release the model, open the accounts, and see that the server answers."""
        if not self.run.registry.list():
            self.run.registry.release(self.run.checkpoint("rl"))
        self._customers()
        with self.console.status("serve"), served(self.run.path):
            pass
        return {"version": self.run.registry.current().version}

    def _customers(self) -> list[dict]:
        """Accounts with money and keys, made once: one customer per family, one who declines, and the operator."""
        path = self.run.path / "customers.json"
        if path.exists():
            return json.loads(path.read_text())
        self.run.service.mkdir(parents=True, exist_ok=True)
        db = Database(service_database(self.run.service))
        try:
            keys, ledger, out = KeyStore.open(db, self.run.service / "pepper"), Ledger(db), []
            for name in [*FAMILIES, "private", "auditor"]:
                consent = name in FAMILIES
                _, secret = keys.create(name, "demo", training_consent=consent)
                ledger.topup(name, BUDGET_NANO, f"demo/{name}")
                out.append({"name": name, "secret": secret, "consent": consent})
            _, secret = keys.create("operator", "demo", role="admin")
            out.append({"name": "operator", "secret": secret, "consent": False})
        finally:
            db.close()
        scratch = path.with_suffix(".tmp")
        scratch.touch(mode=0o600)
        scratch.write_text(json.dumps(out))
        scratch.replace(path)
        return out

    def customer(self, name: str) -> Customer:
        return next(Customer(**c) for c in self._customers() if c["name"] == name)

    def heldout(self, base_url: str, stage: str) -> dict:
        """Held-out tasks through the API, greedy, without consent: how good is what is served?"""
        s = self.settings
        wanted = [t for name in FAMILIES for t in tasks(name, "heldout", s.seed, s.heldout)]
        params = SamplingParams(max_tokens=s.max_tokens, temperature=0.0)
        seed = s.seed * 2 + (stage == "after")

        async def work(office: Office) -> list[Asked]:
            auditor = self.customer("auditor")
            jobs = [partial(office.ask, auditor, t, [t.prompt], 0, seed, params, feedback=False) for t in wanted]
            with self.console.progress(stage, len(jobs), "tasks") as bar:
                return await together(jobs, s.concurrency, lambda scored: bar.advance(1))

        scored = self._in_office(base_url, work)
        return {
            "tokens": sum(x.sampled_tokens for x in scored),
            "families": summarise(scored),
            "examples": [example(x) for name in FAMILIES for x in [y for y in scored if y.task.family == name][:8]],
        }

    def users(self, base_url: str) -> dict:
        """Customers bring tasks of their kind, insist while the answer is wrong, and report the verdict."""
        s = self.settings
        counts = {name: s.traffic_base if FAMILIES[name].kind == "base" else s.traffic_new for name in FAMILIES}
        visits = [(name, i, t) for name in FAMILIES for i, t in enumerate(tasks(name, "traffic", s.seed, counts[name]))]
        random.Random(s.seed).shuffle(visits)
        params = SamplingParams(max_tokens=s.max_tokens, temperature=s.traffic_temperature)
        private = self.customer("private")
        customers = {name: self.customer(name) for name in FAMILIES}

        async def work(office: Office) -> list[list[Asked]]:
            jobs = []
            for name, i, task in visits:
                who = private if i % s.decline_every == s.decline_every - 1 else customers[name]
                jobs.append(partial(office.visit, who, task, s.attempts, s.seed, params))
            with self.console.progress("users", len(jobs), "tasks") as bar:
                return await together(jobs, s.concurrency, lambda tried: bar.advance(1))

        visits_done = self._in_office(base_url, work)
        tried = [x for visit in visits_done for x in visit]
        return {
            "tokens": sum(x.sampled_tokens for x in tried),
            "episodes": len(tried),
            "first_attempt": summarise([visit[0] for visit in visits_done]),
            "solved": summarise([visit[-1] for visit in visits_done]),
        }

    def _in_office(self, base_url: str, work: Callable) -> list:
        async def inside() -> list:
            host = await ToolHost.start(TOOLSET)
            client = Client()
            try:
                return await work(Office(base_url, MODEL, self.run.template(), host, client))
            finally:
                client.close()
                await host.stop()

        return asyncio.run(inside())

    # -- learning from it ---------------------------------------------------------------------------------------------

    def dataset(self) -> dict:
        """What the traces allow to be learned, counted; the candidate stage builds it again from the same traces."""
        data = build(Trace.read(self.run.traces))
        return {
            "tokens": sum(len(x.ids) for x in data.samples),
            "used": len(data.samples),
            "successes": sum(x.outcome.success for x in data.samples),
            "excluded": data.excluded,
        }

    def candidate(self) -> dict:
        """The incumbent, taught what its users verified. Without anything verified it stays as it is, and the gate
        will find no improvement."""
        s = self.settings
        current = self.run.registry.current()
        model = self.run.load(self.run.path / current.checkpoint)
        groups = successes(build(Trace.read(self.run.traces)))
        if not groups:
            save_checkpoint(self.run.checkpoint("candidate"), model, {"stage": "candidate", "parent": current.version})
            return {"curve": [], "groups": {}}
        packs = stream(balanced(groups.values(), s.seed), s.candidate_tokens_per_step)
        with self.console.progress("candidate", s.candidate.steps, "steps") as bar:
            curve = train(model, packs, s.candidate, cross_entropy, lambda i, f: bar.advance(1, loss=f["loss"]))
        save_checkpoint(self.run.checkpoint("candidate"), model, {"stage": "candidate", "parent": current.version})
        counts = {k: len(v) for k, v in groups.items()}
        return {"tokens": curve[-1]["tokens"], "curve": thin(curve), "groups": counts}

    def gate(self) -> dict:
        """Incumbent and candidate on the same held-out tasks, in process, greedy."""
        s, template = self.settings, self.run.template()
        wanted = [(t, 0) for name in FAMILIES for t in tasks(name, "gate", s.seed, s.gate)]
        incumbent = self.run.path / self.run.registry.current().checkpoint

        async def evaluate(checkpoint: Path, bar) -> list[Scored]:
            host = await ToolHost.start(TOOLSET)
            engine = self.run.engine(self.run.load(checkpoint), template, limits=Limits(max_batch=s.concurrency))
            agent = Agent(engine, template, SamplingParams(max_tokens=s.max_tokens, temperature=0.0))
            try:
                return await run_tasks(agent, host, wanted, s.seed, s.concurrency, lambda x: bar.advance(1))
            finally:
                engine.close()
                await host.stop()

        with self.console.progress("gate", 2 * len(wanted), "tasks") as bar:
            before, after = (asyncio.run(evaluate(c, bar)) for c in (incumbent, self.run.checkpoint("candidate")))
        pairs = [(b, a) for b, a in zip(before, after) if b.success is not None and a.success is not None]
        by_family = {
            name: ([b.success for b, _ in pairs if b.task.family == name], [a.success for _, a in pairs if a.task.family == name])
            for name in FAMILIES
        }
        decision = decide(
            {k: v[0] for k, v in by_family.items()},
            {k: v[1] for k, v in by_family.items()},
            {name: f.kind for name, f in FAMILIES.items()},
        )
        return {"tokens": sum(x.episode.sampled_tokens for x in [*before, *after]), **decision.to_dict()}

    def swap(self, base_url: str, passed: bool) -> dict:
        """Release the candidate and swap it in under live requests. A failed gate changes nothing."""
        if not passed:
            return {"swapped": False}
        registry, checkpoint = self.run.registry, self.run.checkpoint("candidate")
        release = registry.current()
        if release.checkpoint != str(checkpoint.relative_to(self.run.path)):
            release = registry.release(checkpoint)
        live = [t for name in names_of("base") for t in tasks(name, "traffic", self.settings.seed + 1, 6)]
        params = SamplingParams(max_tokens=self.settings.max_tokens, temperature=1.0)

        async def work(office: Office) -> list:
            private, operator = self.customer("private"), self.customer("operator")
            traffic = asyncio.gather(*(office.ask(private, t, [t.prompt], 0, self.settings.seed + 1, params, feedback=False) for t in live))
            await asyncio.sleep(0.1)
            server = Endpoint(base_url.removesuffix("/v1"), operator.secret, office.client)
            await server.call("POST", "/admin/weights", {"checkpoint": str(checkpoint), "version": release.version})
            return await traffic

        with self.console.status("swap"):
            during = self._in_office(base_url, work)
        failed = sum(x.success is None for x in during)
        return {"swapped": True, "version": release.version, "requests_during": len(during), "failed_during": failed}

    def report(self, stages: Stages) -> dict:
        with self.console.status("doctor"):
            findings = doctor.examine(self.run, limit=self.settings.examined)
            books = doctor.books(self.run)
        data = assemble(self.settings, stages, findings, books, self.run)
        write_report(data, self.run.path)
        return {"path": str(self.run.path / "report.html")}


def run_demo(directory: Path, settings: DemoSettings, console: Console) -> dict:
    """The whole cycle; returns the report's data. Restarting continues after the last finished stage."""
    demo = Demo(RunDir(directory), settings, console)
    stages = Stages(directory, json.loads(json.dumps(settings.to_dict())))
    try:
        for name in ("tokenizer", "pretrain", "sft", "rl", "serve"):
            stage(stages, console, name, getattr(demo, name))
        with lazily(directory) as base_url:
            stage(stages, console, "before", lambda: demo.heldout(base_url(), "before"))
            stage(stages, console, "users", lambda: demo.users(base_url()))
            stage(stages, console, "dataset", demo.dataset)
            stage(stages, console, "candidate", demo.candidate)
            passed = stage(stages, console, "gate", demo.gate)["passed"]
            stage(stages, console, "swap", lambda: demo.swap(base_url(), passed))
            stage(stages, console, "after", lambda: demo.heldout(base_url(), "after"))
        stage(stages, console, "report", lambda: demo.report(stages))
        return json.loads((directory / "report.json").read_text())
    finally:
        stages.close()


def stage(stages: Stages, console: Console, name: str, work: Callable[[], dict]) -> dict:
    skipped = stages.done(name)
    result = stages.run(name, work)
    console.finished(name, result["wall_s"], skipped)
    return result


@contextmanager
def lazily(directory: Path) -> Iterator[Callable[[], str]]:
    """The server, started when the first stage asks for it and kept for the others."""
    with ExitStack() as stack:
        urls: list[str] = []

        def base_url() -> str:
            if not urls:
                urls.append(stack.enter_context(served(directory)))
            return urls[0]

        yield base_url
