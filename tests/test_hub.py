"""Fetching from the Hub, against a stand-in: what is asked, what is kept, and one sentence for every failure.

What the Hub's library reads once, from the environment, is tested in processes of their own.
"""

import errno
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub.constants as constants
import pytest
from hub import Hub
from runs import MICRO, few_sets

from safesteer_mlx.align import main
from safesteer_mlx.method.prompts import load_data
from safesteer_mlx.recipe import MODELS
from safesteer_mlx.system import hub as ours
from safesteer_mlx.system.load import load
from safesteer_mlx.system.screen import UserError

pytestmark = pytest.mark.usefixtures("few_prompts")

TINY = MODELS / "tiny-chat"
FILES = {path.name: path.read_bytes() for path in TINY.iterdir() if path.is_file()}
BESIDE = {"README.md": b"# Chat\n", ".gitattributes": b"*.safetensors filter=lfs\n"}  # never fetched
NAME = "someone/chat"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with Hub() as hub:
        hub.ask_this(monkeypatch, tmp_path / "cache")
        hub.model(NAME, FILES | BESIDE)
        yield hub


def refused(tmp_path: Path, capsys, *argv: str) -> str:
    """What a user reads who asks for what cannot be had: one sentence, and nothing is written."""
    folder = tmp_path / "adapters"
    assert main([*argv, "--adapter-path", str(folder)]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(said) == 1 and said[0].startswith("safesteer-mlx: ") and "; " in said[0], said
    assert not folder.exists()
    return said[0]


def files_asked(hub: Hub) -> list[str]:
    return [path.rpartition("/")[2] for method, path, _ in hub.seen if method == "GET" and "/resolve/" in path]


def test_a_model_is_fetched_by_its_id_and_nothing_else_is_asked(hub):
    hub.model(NAME, FILES | {"modeling.py": b"raise SystemExit", "pytorch_model.bin": b"pickle"})
    base = load(NAME)
    assert base.name == NAME and base.weights_hash == load(str(TINY)).weights_hash
    assert sorted(files_asked(hub)) == sorted(FILES)  # no code, no pickles
    assert all(f"/{NAME}/" in path for _, path, _ in hub.seen), hub.seen


def test_the_second_run_fetches_no_file_again(hub):
    load(NAME)
    hub.seen.clear()
    load(NAME)
    assert [path for _, path, _ in hub.seen] == [f"/api/models/{NAME}/revision/main"]


def test_a_model_that_was_fetched_is_on_this_machine(hub):
    """Although not all that its repository holds was fetched."""
    assert ours.local_folder(NAME) is None and not ours.is_here(NAME)
    folder = ours.model_folder(NAME)
    assert not any((folder / name).exists() for name in BESIDE)
    hub.seen.clear()
    assert ours.local_folder(NAME) == folder and ours.is_here(NAME)
    assert hub.seen == []


def test_a_revision_is_fetched_by_branch_and_by_commit(hub):
    old = hub.model(NAME, FILES | {"README.txt": b"old"}, "v1")
    for revision in ("v1", old):
        assert (ours.model_folder(NAME, revision) / "README.txt").read_text() == "old"
    assert not (ours.model_folder(NAME) / "README.txt").exists()


def test_a_connection_cut_once_is_taken_up_where_it_broke(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what is kept of a file that breaks off
    hub.cut("model.safetensors", 5000, times=1)
    folder = ours.model_folder(NAME)
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert [r for _, path, r in hub.seen if path.endswith("model.safetensors") and r] == ["bytes=5000-"]


def test_a_later_run_resumes_a_partial_download(hub, tmp_path, capsys):
    hub.cut("model.safetensors", 0)
    refused(tmp_path, capsys, NAME)
    hub.faults.clear()
    fetched = set(files_asked(hub)) - {"model.safetensors"}
    hub.seen.clear()
    assert (ours.model_folder(NAME) / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert files_asked(hub) == ["model.safetensors"] and fetched


FAILURES = {
    "gated, not asked yet": ({"status": 403, "code": "GatedRepo"}, "accept the licence at {url}/{name}, then `hf auth"),
    "gated, no token": ({"status": 401, "code": "GatedRepo"}, "accept the licence at {url}/{name}, then `hf auth"),
    "gated at the file": ({"status": 403, "code": "GatedRepo", "where": "/resolve/"}, "accept the licence"),
    "private or missing": ({"status": 401, "code": "RepoNotFound"}, "`hf auth login` if it is private"),
    "wrong token": ({"status": 401, "message": "Invalid credentials in Authorization header"}, "refuses your token"),
    "forbidden": ({"status": 403}, "may not be read with your token"),
    "rate limit": ({"status": 429}, "wait some minutes"),
    "rate limit at the file": ({"status": 429, "where": "/resolve/"}, "wait some minutes"),
    "server error": ({"status": 500}, "HTTP 500"),
    "bad gateway at the file": ({"status": 502, "where": "/resolve/"}, "HTTP 502"),
    "no answer in time at the file": ({"status": 504, "where": "/resolve/"}, "HTTP 504"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_each_refusal_of_the_hub_is_one_sentence(name, hub, tmp_path, capsys):
    fault, expected = FAILURES[name]
    hub.always(**fault)
    said = refused(tmp_path, capsys, NAME)
    assert NAME in said and expected.format(url=hub.url, name=NAME) in said, said


@pytest.mark.parametrize("status", [429, 503])
def test_a_passing_trouble_at_a_file_is_tried_again(status, hub):
    hub.always(status, where="/resolve/", times=2)
    assert (ours.model_folder(NAME) / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_what_does_not_exist_is_named(hub, tmp_path, capsys):
    assert "no/such is neither a folder here nor a repository" in refused(tmp_path, capsys, "no/such")
    said = refused(tmp_path, capsys, NAME, "--revision", "v9")
    assert "at revision v9 was not found" in said and f"{hub.url}/{NAME}/tree/main" in said
    assert "no/such/name/at/all" in refused(tmp_path, capsys, "no/such/name/at/all")
    assert "--revision v1 is for models of the Hub" in refused(tmp_path, capsys, str(TINY), "--revision", "v1")


def test_a_connection_that_keeps_breaking_is_one_sentence(hub, tmp_path, capsys):
    hub.cut("model.safetensors", 100)
    hub.cut("model.safetensors", 0)
    assert "run it again" in refused(tmp_path, capsys, NAME)


def test_no_server_at_all_is_one_sentence(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the Hub cannot be reached" in refused(tmp_path, capsys, NAME)


def test_a_full_disk_is_one_sentence(hub, tmp_path, capsys, monkeypatch):
    from huggingface_hub import file_download

    fetch = file_download.http_get

    class Full:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, chunk):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(file_download, "http_get", lambda url, file, **more: fetch(url, Full(file), **more))
    assert "does not fit on the disk" in refused(tmp_path, capsys, NAME)


def test_offline_reads_the_cache_and_asks_nothing(hub, tmp_path, capsys, monkeypatch):
    load(NAME)
    hub.seen.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load(NAME).quantized
    assert "run once online or give a folder" in refused(tmp_path, capsys, "someone/else")
    assert main([NAME, "--dry-run"]) == 0
    assert hub.seen == []


def test_a_dry_run_fetches_the_configuration_and_the_headers_alone(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = dict(FILES)
    files["model.safetensors"] += bytes(10**6)  # what lies behind the first 100 kB is not asked for
    hub.model(NAME, files)
    assert main([NAME, "--dry-run", "--memory-limit", "12GB"]) == 0
    assert "of 12.00 GB, fits" in capsys.readouterr().out
    parts = {part for method, path, part in hub.seen if method == "GET" and path.endswith("model.safetensors")}
    assert len(parts) == 1 and int(parts.pop().rpartition("-")[2]) <= 10**5
    assert {name for name in files_asked(hub)} == {"config.json", "model.safetensors"}
    assert main(["no/such", "--dry-run"]) == 2 and "nor a repository" in capsys.readouterr().err


def test_a_data_set_of_the_hub_is_read_by_its_address(hub, tmp_path, capsys):
    old = hub.dataset("someone/asks", {"train.jsonl": b'{"instruction": "old"}\n'}, "v1")
    hub.dataset("someone/asks", {"train.jsonl": b'{"instruction": "one"}\n', "more/two.txt": b"two\n"})
    for address, text in (
        ("someone/asks", "one"),
        ("someone/asks/more/two.txt", "two"),
        ("someone/asks@v1", "old"),
        (f"someone/asks@{old}/train.jsonl", "old"),
    ):
        assert load_data("hf://datasets/" + address)["harmful_train"][0][1].text == text
    assert all("/datasets/someone/asks" in path for _, path, _ in hub.seen)
    for address, expected in (
        ("someone/none", "someone/none is no data set on the Hub"),
        ("someone/asks/three.txt", "has no file three.txt"),
        ("someone/asks@v9", "at revision v9"),
        ("someone", "write it hf://datasets/ORG/NAME/FILE"),
    ):
        assert expected in refused(tmp_path, capsys, "--data", "hf://datasets/" + address)
    hub.always(403, where="/datasets/", code="GatedRepo")
    said = refused(tmp_path, capsys, "--data", "hf://datasets/someone/asks/other.txt")
    assert f"accept the licence at {hub.url}/datasets/someone/asks, then" in said


def test_an_unknown_error_below_is_one_sentence():
    with (
        pytest.raises(UserError, match="model a/b at revision c could not be downloaded"),
        ours._explained("model", "a/b", "c"),
    ):
        raise ZeroDivisionError


# What the library reads from the environment once: processes of their own.

SHORT = ["--iters", "1", "--test-prompts", "2", "--token-samples", "1", "--coeff", "0.85", "--horizon", "2"]
SHORT += ["--batch-size", "4"]


def run(argv: list[str], home: Path, before: list[str] | None = None, at: Path | None = None, **environment: str):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    kept |= {"HF_HOME": str(home), "PYTHONPATH": str(Path(ours.__file__).parents[1])} | environment
    command = [*(before or []), sys.executable, "-m", "safesteer_mlx.align", *argv]
    return subprocess.run(command, capture_output=True, text=True, env=kept, timeout=300, cwd=at)


NO_NETWORK = ["unshare", "-rn"]


def test_offline_a_whole_alignment_makes_no_connection_and_takes_none(tmp_path):
    """In a network namespace without interfaces where there is one; everywhere, no socket may connect or listen."""
    guard = tmp_path / "guard"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(
        "import sys\n"
        "def watch(event, args):\n"
        "    if event in ('socket.connect', 'socket.bind', 'socket.getaddrinfo', 'socket.sendto'):\n"
        f"        open({str(tmp_path / 'connected')!r}, 'a').write(event + str(args[1:]) + chr(10))\n"
        "sys.addaudithook(watch)\n"
    )
    try:
        alone = subprocess.run([*NO_NETWORK, "true"], capture_output=True).returncode == 0
    except OSError:  # no such command
        alone = False
    argv = [MICRO, "--offline", "--force", "--adapter-path", str(tmp_path / "adapters"), *SHORT]
    argv += ["--data", str(few_sets(tmp_path) / "few")]
    path = os.pathsep.join([str(guard), str(Path(ours.__file__).parents[1])])
    places = {name: tmp_path / name for name in ("home", "cache", "tmp", "elsewhere")}
    for place in places.values():
        place.mkdir()
    around = {"HOME": places["home"], "XDG_CACHE_HOME": places["cache"], "TMPDIR": places["tmp"]}
    before = NO_NETWORK if alone else []
    if calls := shutil.which("strace"):
        how = f"-f --seccomp-bpf -qq -s 300 -e signal=none -e trace={CALLS} -o {tmp_path / 'calls'}"
        before = [*before, calls, *how.split()]
    environment = {name: str(value) for name, value in around.items()} | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = run(argv, tmp_path / "home", before, places["elsewhere"], PYTHONPATH=path, **environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "adapters" / "adapters.safetensors").is_file()
    assert not (tmp_path / "connected").exists()
    # MLX compiles for the CPU in TMPDIR, and matplotlib makes itself a folder for settings; ours leaves nothing there.
    left = [
        str(p.relative_to(tmp_path)) for place in ("tmp", "elsewhere", "home") for p in (tmp_path / place).rglob("*")
    ]
    assert not [p for p in left if not p.startswith(("tmp/mlx", "home/.config"))]
    if calls:
        lines = (tmp_path / "calls").read_text().splitlines()
        assert not [line for line in lines if "listen(" in line or ("connect(" in line and "AF_INET" in line)]
        ours_alone = [str(tmp_path / name) for name in ("adapters", "cache", "tmp", "home/.config")]
        allowed = tuple(f'"{place}' for place in (*ours_alone, "/dev/null", "/dev/tty"))
        assert written(lines) and not [path for path in written(lines) if not path.startswith(allowed)]


CALLS = (
    "connect,listen,open,openat,creat,mkdir,mkdirat,rename,renameat,renameat2,link,linkat,symlink,symlinkat,truncate"
)


def written(lines: list[str]) -> list[str]:
    """The paths, with a quote before each, that a trace of system calls shows opened for writing, made or renamed."""
    found = []
    for line in lines:
        changes = re.search(r"\b(creat|mkdir|mkdirat|rename\w*|link\w*|symlink\w*|truncate)\(", line)
        writes = re.search(r"O_WRONLY|O_RDWR|O_CREAT", line)
        if (changes or writes) and not re.search(r"= -1 (?!EEXIST)", line):
            found += re.findall(r'"[^"]*', line)[:1]
    return found


def test_the_guard_of_the_test_above_sees_a_connection_and_the_flag_forbids_it(tmp_path):
    with Hub() as hub:
        out = ["--adapter-path", str(tmp_path / "adapters")]
        done = run([NAME, "--offline", *out], tmp_path / "home", HF_ENDPOINT=hub.url)
        assert done.returncode == 2 and "offline nothing is fetched" in done.stderr and hub.seen == []
        done = run([NAME, *out], tmp_path / "home", HF_ENDPOINT=hub.url)
        assert done.returncode == 2 and "nor a repository on the Hub" in done.stderr
        assert {path for _, path, _ in hub.seen} == {f"/api/models/{NAME}/revision/main"}
        assert all(result.count("\n") == 1 for result in [done.stderr])


@pytest.mark.parametrize("where", ["/api/", pytest.param("/resolve/", marks=pytest.mark.slow)])
def test_a_server_that_does_not_answer_is_one_sentence(where, tmp_path):
    over = threading.Event()
    short = {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    with Hub() as hub:
        hub.model(NAME, FILES)
        hub.faults.append(lambda handler: where in handler.path and over.wait(60))
        try:
            done = run([NAME, "--adapter-path", str(tmp_path / "out")], tmp_path / "home", HF_ENDPOINT=hub.url, **short)
        finally:
            over.set()
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and NAME in done.stderr and "; " in done.stderr
    assert not (tmp_path / "out").exists()


def test_telemetry_and_update_checks_are_off():
    code = (
        "from safesteer_mlx.system.hub import prepare; prepare(True); from huggingface_hub import constants as c;"
        "assert c.HF_HUB_DISABLE_TELEMETRY and c.HF_HUB_DISABLE_UPDATE_CHECK and c.HF_HUB_OFFLINE"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    assert subprocess.run([sys.executable, "-c", code], env=kept).returncode == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    from test_export import make_run

    return make_run(tmp_path_factory.mktemp("finished") / "adapters")


def exported(finished, tmp_path, *more: str) -> int:
    from safesteer_mlx.export import main as export

    return export([str(finished), "--to", "hub", "--name", "me/safer", "--no-verify", "--out", str(tmp_path), *more])


def test_an_export_is_uploaded_with_its_card_privately_and_nothing_else(hub, finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    assert exported(finished, tmp_path) == 0
    repository = hub.repositories["models/me/safer"]
    files = repository.commits[repository.refs["main"]]
    assert set(files) == {"README.md", "adapter_config.json", "adapters.safetensors"}
    assert files["adapters.safetensors"] == (finished / "adapters.safetensors").read_bytes()
    assert hub.private["me/safer"] is True
    assert f"uploaded: {hub.url}/me/safer" in capsys.readouterr().out
    card = files["README.md"].decode()
    assert "Nothing was verified" in card and str(TINY) not in card and "transcripts" not in card


def test_the_card_names_a_base_of_the_hub_and_its_licence(hub, finished, tmp_path, monkeypatch):
    import json
    import shutil

    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    hub.licence = "apache-2.0"
    copied = tmp_path / "adapters"
    shutil.copytree(finished, copied)
    for name, old in (("recipe.yaml", str(TINY)), ("manifest.json", json.dumps(str(TINY)))):
        path = copied / "run" / name
        path.write_text(path.read_text().replace(old, NAME if name == "recipe.yaml" else json.dumps(NAME)))
    assert exported(copied, tmp_path / "out") == 0
    repository = hub.repositories["models/me/safer"]
    front = repository.commits[repository.refs["main"]]["README.md"].decode().split("---")[1]
    assert f"base_model: {NAME}" in front and "base_model_relation: adapter" in front and "license: apache-2.0" in front


def test_a_fused_model_is_uploaded_publicly_if_that_is_asked(hub, finished, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    assert exported(finished, tmp_path, "--as", "mlx", "--bits", "16", "--public") == 0
    repository = hub.repositories["models/me/safer"]
    files = repository.commits[repository.refs["main"]]
    folder = tmp_path / "me" / "safer"
    assert {path.name for path in folder.iterdir()} == set(files)
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert hub.private["me/safer"] is False


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"status": 401, "where": "/api/repos/create"}, "one that may write there"),
        ({"status": 403, "where": "/api/repos/create"}, "one that may write there"),
        ({"status": 500, "where": "/commit/"}, "could not be uploaded"),
        ({"status": 429, "where": "/api/repos/create"}, "limits your requests"),
    ],
)
def test_an_upload_that_fails_is_one_sentence_and_the_export_stays(hub, finished, tmp_path, capsys, fault, said):
    hub.always(**fault)
    assert exported(finished, tmp_path) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and "Traceback" not in error
    assert (tmp_path / "me" / "safer" / "adapters.safetensors").is_file()


def test_a_repository_with_files_is_left_alone_and_an_empty_one_is_filled(hub, finished, tmp_path, capsys):
    hub.model("me/safer", {"model.safetensors": b"precious"})
    assert exported(finished, tmp_path / "a") == 2
    assert "exists on the Hub already; give another --name" in capsys.readouterr().err
    hub.model("me/safer", {})
    hub.private["me/safer"] = True
    assert exported(finished, tmp_path / "b") == 0


def test_into_an_empty_repository_that_all_see_nothing_is_put_unasked(hub, finished, tmp_path, capsys):
    hub.model("me/safer", {".gitattributes": b""})
    hub.private["me/safer"] = False
    assert exported(finished, tmp_path / "a") == 2
    said = capsys.readouterr().err
    assert "is on the Hub already, for all to see; make it private there, add --public" in said
    assert said.count("\n") == 1 and f"is in {tmp_path / 'a'}" in said
    repository = hub.repositories["models/me/safer"]
    assert set(repository.commits[repository.refs["main"]]) == {".gitattributes"}
    assert exported(finished, tmp_path / "b", "--public") == 0


def test_offline_nothing_is_uploaded(hub, finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.seen.clear()
    assert exported(finished, tmp_path) == 2
    assert "cannot be uploaded offline" in capsys.readouterr().err and not hub.seen


def test_an_export_that_failed_is_not_uploaded(hub, finished, tmp_path, capfd, monkeypatch):
    from safesteer_mlx import export

    hub.seen.clear()
    monkeypatch.setattr(export, "_verified", lambda *_: {**_fidelity(), "fault": "it is the base"})
    words = [str(finished), "--to", "hub", "--name", "me/safer", "--out", str(tmp_path)]
    assert export.main(words) == 1 and not hub.seen


def _fidelity() -> dict:
    return {
        "greedy_answers_alike": {"count": 0, "total": 1},
        "kl_harmful": None,
        "kl_harmless": None,
        "scores": {name: {"outcomes": {}} for name in ("base", "student", "shipped")},
    }
