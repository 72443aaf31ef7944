"""Suites by name: each one's own schema, from a stand-in for the Hub on the loopback and from local files.

The prompts in these files are harmless; only their columns are the suites'.
"""

import csv
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from safesteer_mlx.evals.suites import Suite, find_suite, load_suite, names
from safesteer_mlx.system.screen import UserError

PROMPTS = [f"How do I bake bread number {n}?" for n in range(5)]
ANSWER = {"response_0": "x", "response_1": "y"}


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def csv_of(rows) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


# A row that a suite's rule leaves out comes last where it has one.
FILES = {
    "AdvBench": csv_of([{"goal": p, "target": "Sure"} for p in PROMPTS]),
    "PKU-SafeRLHF": jsonl(
        [{"prompt": p, **ANSWER, "is_response_0_safe": False, "is_response_1_safe": False} for p in PROMPTS * 2]
        + [{"prompt": "left out", **ANSWER, "is_response_0_safe": True, "is_response_1_safe": False}]
    ),
    "HarmBench": csv_of(
        [{"Behavior": p, "FunctionalCategory": "standard"} for p in PROMPTS]
        + [{"Behavior": "left out", "FunctionalCategory": "contextual"}]
    ),
    "JailbreakBench": csv_of([{"Index": i, "Goal": p, "Target": "Sure"} for i, p in enumerate(PROMPTS)]),
    "SORRY-Bench": jsonl(
        [{"question_id": i, "turns": [p], "prompt_style": "base"} for i, p in enumerate(PROMPTS)]
        + [{"question_id": 9, "turns": ["left out"], "prompt_style": "slang"}]
    ),
    "HarmfulQA": json.dumps([{"id": i, "topic": "t", "question": p} for i, p in enumerate(PROMPTS)]).encode(),
    "ALERT": jsonl(
        [{"id": i, "category": "c", "prompt": f"### Instruction:\n{p}\n### Response:\n"} for i, p in enumerate(PROMPTS)]
    ),
    "XSTest": csv_of(
        [{"id": i, "prompt": p, "type": "t", "label": "safe"} for i, p in enumerate(PROMPTS)]
        + [{"id": 9, "prompt": "left out", "type": "contrast", "label": "unsafe"}]
    ),
    "OR-Bench": csv_of([{"prompt": p, "category": "c"} for p in PROMPTS]),
}
TASKS = {"MMLU-STEM", "GSM8K", "MATH", "HumanEval"}
FETCHED = [name for name in FILES if name != "HarmBench"]  # whose file on the Hub is parquet


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub that has these files and nothing else, at any revision; what it was asked for; a way to ask it."""
    files, asked = {}, []
    for name, content in FILES.items():
        suite = find_suite(name)
        files[f"/datasets/{suite.repository}/resolve/{suite.revision}/{suite.file}"] = content

    class Handler(BaseHTTPRequestHandler):
        def answer(self, body: bool) -> None:
            asked.append(self.path)
            content = files.get(self.path, b"")
            if hub.gated:
                self.send_response(403)
                self.send_header("X-Error-Code", "GatedRepo")
            elif not content:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
            else:
                self.send_response(200)
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                revision = self.path.split("/resolve/")[1].split("/")[0]
                self.send_header("X-Repo-Commit", revision if len(revision) == 40 else "0" * 40)
            self.send_header("Content-Length", str(len(content) if not hub.gated else 0))
            self.end_headers()
            if body and not hub.gated:
                self.wfile.write(content)

        def do_HEAD(self):
            self.answer(False)

        def do_GET(self):
            self.answer(True)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cache = tmp_path_factory.mktemp("cache")

    def evaluate(*flags: str, **more: str) -> subprocess.CompletedProcess:
        env = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(cache)}
        env |= {"HF_HUB_DISABLE_TELEMETRY": "1"} | more
        env.pop("HF_HUB_OFFLINE", None) if "HF_HUB_OFFLINE" not in more else None
        command = [sys.executable, "-m", "safesteer_mlx.evaluate", "--test-prompts", "3", "--max-tokens", "8", *flags]
        return subprocess.run(command, capture_output=True, text=True, env=env, check=False)

    hub = types.SimpleNamespace(files=files, asked=asked, evaluate=evaluate, gated=False)
    yield hub
    server.shutdown()


def test_every_suite_has_a_file_of_known_keys_and_a_kind():
    assert set(names()) == set(FILES) | TASKS | {"AlpacaEval"}
    for name in set(FILES) | TASKS:
        suite = find_suite(name)
        if name in TASKS:
            assert suite.kind == "task" and suite.task
        else:
            assert suite.kind in ("harmful", "harmless", "borderline")
            assert all((suite.repository, suite.revision, suite.file, suite.column, suite.licence))


@pytest.mark.parametrize("name", FILES)
def test_each_schema_is_read_once_a_prompt_and_by_its_rule(name, tmp_path):
    file = tmp_path / Path(find_suite(name).file).name.replace(".parquet", ".csv")
    file.write_bytes(FILES[name])
    assert [item.text for item in load_suite(find_suite(name), file)] == PROMPTS


def test_every_suite_runs_to_the_end_from_the_hub(hub, tmp_path):
    local = tmp_path / "harmbench.csv"
    local.write_bytes(FILES["HarmBench"])
    done = hub.evaluate("--suite", *FETCHED, f"harmbench={local}", "--out", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    out = json.loads((tmp_path / "out.json").read_text())
    assert set(out["base"]["outcomes"]) == set(FILES) and out["base"]["capability"] == {}
    for cell in out["base"]["outcomes"].values():
        assert [sum(cell[how].values()) for how in ("greedy", "sampled")] == [3, 3]
    assert out["kinds"]["XSTest"] == out["kinds"]["OR-Bench"] == "borderline" and out["kinds"]["ALERT"] == "harmful"
    assert out["base"]["drift"] is None
    assert all(name in done.stdout for name in FILES) and not any(p in done.stdout + done.stderr for p in PROMPTS)
    # Asked for by name, and for nothing else.
    assert set(hub.asked) == {path for path in hub.files if "HarmBench" not in path}

    # A second run finds them in the cache, with no Hub to ask.
    hub.asked.clear()
    again = hub.evaluate("--suite", "XSTest", HF_HUB_OFFLINE="1")
    assert again.returncode == 0 and hub.asked == []


def test_nothing_is_fetched_unasked(hub):
    hub.asked.clear()
    assert hub.evaluate().returncode == 0 and hub.asked == []


def test_what_cannot_be_had_is_one_sentence(hub):
    def said(*flags: str, **more: str) -> str:
        done = hub.evaluate("--suite", *flags, **more)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
        return done.stderr

    assert "did you mean AdvBench" in said("AdvBnch")
    assert "paid judge" in said("AlpacaEval")
    assert "nowhere.csv" in said("XSTest=nowhere.csv")
    hub.asked.clear()
    assert "pyarrow" in (parquet := said("HarmBench")) and "HarmBench=FILE" in parquet and not hub.asked
    hub.gated = True
    assert "hf auth login" in said("SORRY-Bench", HF_HOME="/nonexistent/cache")
    hub.gated = False
    del hub.files[next(path for path in hub.files if "HarmfulQA" in path)]
    assert "HarmfulQA=FILE" in said("HarmfulQA", HF_HOME="/nonexistent/cache")
    offline = said("OR-Bench", HF_HOME="/nonexistent/cache", HF_HUB_OFFLINE="1")
    assert "offline nothing is fetched" in offline and "OR-Bench=FILE" in offline


def test_a_long_field_beside_the_prompt_is_no_hindrance(tmp_path):
    (tmp_path / "long.csv").write_text(f"Goal,Target\n{PROMPTS[0]},{'x' * 200_000}\n")
    assert len(load_suite(find_suite("JailbreakBench"), tmp_path / "long.csv")) == 1


BAD = {
    "no such column": (b"a,b\n1,2\n", ".csv", "Goal"),
    "not JSON": (b"{", ".jsonl", "line 1 is not JSON"),
    "not a list": (b'{"Goal": "x"}', ".json", "list"),
    "not a text": (b'[{"Goal": 3}]', ".json", "int"),
    "no prompts": (b"Goal\n", ".csv", "no prompts"),
    "not UTF-8": (b"Goal\n\xff\xfe\n", ".csv", "not UTF-8 text"),
    "another kind of file": (b"x", ".xml", ".xml"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_file_is_a_sentence_without_its_content(name, tmp_path):
    content, suffix, expected = BAD[name]
    file = tmp_path / f"file{suffix}"
    file.write_bytes(content)
    with pytest.raises(UserError, match=expected):
        load_suite(find_suite("JailbreakBench"), file)


def test_parquet_is_read_where_pyarrow_is(tmp_path, monkeypatch):
    (tmp_path / "file.parquet").touch()
    table = types.SimpleNamespace(to_pylist=lambda: [{"prompt": p} for p in PROMPTS])
    parquet = types.SimpleNamespace(read_table=lambda path: table)
    monkeypatch.setitem(sys.modules, "pyarrow", types.SimpleNamespace(parquet=parquet))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    suite = Suite("own", "harmful", column=["prompt"])
    assert [item.text for item in load_suite(suite, tmp_path / "file.parquet")] == PROMPTS
