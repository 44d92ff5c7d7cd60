"""The command line: every command explains itself, bad input is one clear line, never a traceback."""

import argparse
import json
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tidelock.cli.main import COMMANDS, main, parser
from tidelock.models import TransformerLM, preset, save_checkpoint


def tidelock(capsys, *argv):
    try:
        code = main(list(argv))
    except SystemExit as e:  # argparse's own way out
        code = e.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_and_json(capsys, command):
    code, out, _ = tidelock(capsys, command, "--help")
    assert code == 0 and "example" in out and f"tidelock {command}" in out and "--json" in out


@pytest.fixture
def run_dir(tmp_path):
    from tidelock.tokens.tokenizer import BPETokenizer

    BPETokenizer.train(["some text"] * 9, 300).save(tmp_path / "tokenizer")
    save_checkpoint(tmp_path / "checkpoints" / "m", TransformerLM(preset("nano-k3", 304)))
    assert main(["release", str(tmp_path), "release", str(tmp_path / "checkpoints" / "m")]) == 0
    return tmp_path


def test_the_agent_speaks_text_or_token_ids_to_a_real_server(capsys, run_dir, tmp_path):
    from tidelock.loop.server_process import served

    made = tmp_path / "key.json"
    assert main(["keys", "create", "--dir", str(run_dir / "service"), "--customer", "a", "--usd", "1", "--admin", "--json", str(made)]) == 0
    key = json.loads(made.read_text())["secret"]
    with served(run_dir) as url:
        common = ["agent", "hi", "--base-url", url, "--api-key", key, "--tools", "none", "--max-turns", "1", "--max-tokens", "6"]
        for extra in ([], ["--tokenizer", str(run_dir / "tokenizer")]):
            assert main([*common, *extra, "--json", str(tmp_path / "r.json")]) in (0, 1), capsys.readouterr().err
            result = json.loads((tmp_path / "r.json").read_text())
            assert result["usage"]["completion_tokens"] == 6 or result["stop_reason"] == "answered"
        code, _, err = tidelock(capsys, *common, "--tokenizer", str(tmp_path / "nowhere"))
        one_line(code, err, "no tokenizer", "nowhere")


def one_line(code, err, *words):
    assert code == 2, err
    assert err.startswith("tidelock: error: ") and err.count("\n") == 1 and "Traceback" not in err
    assert all(w in err for w in words), err


def test_missing_things_are_named(capsys, tmp_path):
    nowhere = str(tmp_path / "nowhere")
    for argv in (["serve", nowhere], ["doctor", nowhere], ["eval", nowhere], ["release", nowhere, "list"],
                 ["cycle", nowhere], ["demo", "--text", nowhere, "--dir", str(tmp_path / "d")]):  # fmt: skip
        code, _, err = tidelock(capsys, *argv)
        one_line(code, err, "nowhere")
    assert not (tmp_path / "d").exists() and not (tmp_path / "nowhere").exists()


def test_wrong_words_are_answered_with_the_right_ones(capsys, run_dir):
    code, _, err = tidelock(capsys, "pretrain", str(run_dir / "x"), "--preset", "mega-k9")
    one_line(code, err, "mega-k9", "nano-k3")
    code, _, err = tidelock(capsys, "eval", str(run_dir), "--family", "hopz")
    one_line(code, err, "hopz", "lookup")
    code, _, err = tidelock(capsys, "agent", "x", "--base-url", "http://127.0.0.1:1/v1", "--api-key", "k", "--tools", "laser")
    one_line(code, err, "laser", "calculator")
    code, _, err = tidelock(capsys, "nonsense")
    assert code == 2 and "Traceback" not in err


def test_a_taken_port_is_one_clear_line(capsys, run_dir):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, err = tidelock(capsys, "serve", str(run_dir), "--port", str(taken.getsockname()[1]))
    one_line(code, err, "--port")


@pytest.mark.parametrize("spoil,words", [
    (lambda d: (d / "config.json").write_text("{"), "config.json"),
    (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:1000]), "model.safetensors"),
    (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
])  # fmt: skip
def test_a_corrupt_checkpoint_names_its_file(capsys, run_dir, spoil, words):
    spoil(run_dir / "checkpoints" / "m")
    code, _, err = tidelock(capsys, "eval", str(run_dir), "-n", "1")
    one_line(code, err, words)


def test_an_unreachable_endpoint_is_one_clear_line(capsys):
    code, _, err = tidelock(capsys, "agent", "x", "--base-url", "http://127.0.0.1:1/v1", "--api-key", "k", "--tools", "none")
    one_line(code, err, "127.0.0.1:1")
    code, _, err = tidelock(capsys, "agent", "x", "--base-url", "http://127.0.0.1:1/v1")
    one_line(code, err, "API key")


def test_results_are_written_for_machines(capsys, run_dir):
    path = run_dir / "out.json"
    code, out, _ = tidelock(capsys, "release", str(run_dir), "list", "--json", str(path))
    assert code == 0 and "v1" in out
    assert json.loads(path.read_text())["releases"][0]["version"] == 1
    code, _, err = tidelock(capsys, "release", str(run_dir), "list", "--json", str(run_dir / "no" / "out.json"))
    one_line(code, err, "out.json")


def test_an_unexpected_failure_is_one_line_that_names_where_the_details_are(capsys, monkeypatch):
    from tidelock.cli import doctor

    monkeypatch.setattr(doctor, "run", lambda args: 1 / 0)
    code, _, err = tidelock(capsys, "doctor")
    assert code == 1 and err.count("\n") == 1 and "ZeroDivisionError" in err and "Traceback" not in err
    assert "Traceback" in open(err.split("details in ")[1].rstrip(")\n")).read()


def test_the_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "tidelock", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "demo" in done.stdout


def test_one_flag_trains_the_experts_in_four_bits_from_sft_on():
    import argparse

    from tidelock.cli.training import add_settings, settings_from

    parser = argparse.ArgumentParser()
    add_settings(parser)
    settings = settings_from(parser.parse_args(["run", "--expert-format", "mxfp4"]))
    formats = [getattr(settings, stage).expert_format for stage in ("pretrain", "sft", "rl", "candidate")]
    assert formats == [None, "mxfp4", "mxfp4", "mxfp4"]
    assert settings_from(parser.parse_args(["run"])).sft.expert_format is None


Found = tuple[tuple[str, ...], argparse.ArgumentParser]


def leaves(at: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[Found]:
    below = [action for action in at._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield path, at
    for action in below:
        for name, inner in action.choices.items():
            yield from leaves(inner, (*path, name))


LEAVES = dict(leaves(parser()))


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_the_help_of_every_command_ends_with_an_example_of_it_that_can_be_read(path):
    examples = [shlex.split(line) for line in LEAVES[path].epilog.splitlines()[1:]]
    assert examples and all(words[: len(path) + 1] == ["tidelock", *path] for words in examples)
    for words in examples:
        parser().parse_args(words[1:])
