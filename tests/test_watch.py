"""--watch: the page of a run that is going on, for this computer's browser alone, and as far as the run has come."""

import http.client
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
from runs import HOSTILE, files, write_run
from test_report import Page, browser  # noqa: F401  a fixture

from safesteer_mlx import report
from safesteer_mlx.align import main as align
from safesteer_mlx.report import GoingRun, check_watch, watching
from safesteer_mlx.system import serve
from safesteer_mlx.system.screen import UserError
from safesteer_mlx.system.serve import PageServer

OPEN = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


@pytest.fixture(scope="module")
def server():
    with PageServer(lambda: (b"<p>the page", True)) as serving:
        yield serving


def ask(server, method="GET", path=None, host=None, more=()):
    """Status, headers and body of one request, as it is written here."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.putrequest(method, server.path if path is None else path, skip_host=True)
    for name, value in [("Host", host or f"127.0.0.1:{server.server_port}"), *more]:
        if value:
            connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, answer.headers, body


def test_the_page_is_served_on_loopback_under_a_random_word(server):
    assert server.socket.getsockname()[0] == "127.0.0.1"
    with OPEN(server.address) as answer:
        assert answer.read() == b"<p>the page" and answer.headers["Refresh"] == str(serve.REFRESH)
        assert answer.headers["Cache-Control"] == "no-store" and "default-src 'none'" in str(answer.headers)
    assert ask(server, host=f"localhost:{server.server_port}")[0] == 200
    assert len(server.path) > 20
    with PageServer(server.draw) as other:
        assert other.path != server.path and other.server_port != server.server_port


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "",
        "/report.html",
        "/transcripts.jsonl",
        "/{token}",
        "/{token}/transcripts.jsonl",
        "/{token}/../{token}/",
        "/{token}/./",
        "/{token}/?x=1",
        "/{token}/#x",
        "/{token}/%2e%2e/%2e%2e/etc/passwd",
        "/../../../../etc/passwd",
        "/{TOKEN}/",
        "/{short}/",
        "http://127.0.0.1/{token}/",
        "/\u00e9/",
    ],
)
def test_any_other_path_is_not_found(server, path):
    token = server.path.strip("/")
    path = path.format(token=token, TOKEN=token.swapcase(), short=token[:-1])
    connection = socket.create_connection(("127.0.0.1", server.server_port), timeout=10)
    with connection:
        head = f"GET {path or '*'} HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode("latin-1"))
        said = b"".join(iter(lambda: connection.recv(4096), b"")).decode("latin-1")
    assert said.startswith("HTTP/1.0 404") and "the page" not in said and token not in said


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example:{port}", "0.0.0.0:{port}"]
)
def test_another_name_for_this_computer_is_refused(server, host):
    """As a page from elsewhere has it whose name was made to lead here."""
    status, _, body = ask(server, host=host.format(port=server.server_port))
    assert status == 403 and b"the page" not in body


@pytest.mark.parametrize("more", [[("Host", "evil.example")], []])
def test_two_names_or_none_are_refused(server, more):
    assert ask(server, host=None if more else " ", more=more)[0] == 403


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "get"])
def test_it_can_only_be_read(server, method):
    status, _, body = ask(server, method)
    assert status == 501 and b"the page" not in body


def test_it_says_nothing_of_itself_or_of_requests(server, capsys):
    headers = ask(server)[1]
    assert headers["Server"].strip() == "safesteer-mlx"
    with socket.create_connection(("127.0.0.1", server.server_port)) as gone:
        gone.sendall(b"GET / HT")
    time.sleep(0.1)
    assert ask(server)[0] == 200 and capsys.readouterr() == ("", "")


def test_a_browser_that_says_nothing_keeps_no_other_waiting(server):
    with socket.create_connection(("127.0.0.1", server.server_port)):
        assert ask(server)[0] == 200


def test_it_ends_with_the_command_and_lets_see_the_end():
    more = [True]
    with PageServer(lambda: (b"x", more[0])) as serving:
        began = time.monotonic()
        serving.let_see_the_end()  # nobody looks
        assert time.monotonic() - began < 1
        ask(serving)
        more[0] = False
        threading.Timer(0.2, ask, [serving]).start()
        serving.let_see_the_end()
        assert serving.shown_last.is_set()
    with pytest.raises(ConnectionRefusedError):
        ask(serving)


@pytest.mark.parametrize("command", [["align", "--dry-run"], ["report", "adapters"]], ids=lambda words: words[0])
def test_a_port_in_use_is_one_sentence(server, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapters" / "run" / "checkpoint").mkdir(parents=True)
    (tmp_path / "adapters" / "run" / "recipe.yaml").write_text("model: x\n")
    name, *words = command
    main = {"align": align, "report": report.main}[name]
    assert main([*words, "--watch", "--watch-port", str(server.server_port)]) == 2
    said = capsys.readouterr().err
    assert f"--watch-port {server.server_port} cannot be used" in said and said.count("\n") == 1


@pytest.mark.parametrize("port", ["-1", "65536", "x", "1.5"])
def test_a_port_that_is_none_is_one_sentence(port, tmp_path, capsys):
    assert align(["--watch", "--watch-port", port, "--dry-run"]) == 2
    assert report.main([str(tmp_path), "--watch", "--watch-port", port]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_without_matplotlib_one_sentence_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    assert align(["--watch"]) == 2
    said = capsys.readouterr().err
    assert "pip install 'safesteer-mlx[report]'" in said and said.count("\n") == 1 and not list(tmp_path.iterdir())
    with pytest.raises(UserError):
        check_watch(0)


def test_a_run_that_is_done_or_not_there_is_not_watched(tmp_path, capsys):
    assert report.main([str(tmp_path), "--watch"]) == 2
    assert "holds no run; give the adapter folder" in capsys.readouterr().err
    assert report.main([str(write_run(tmp_path, files())), "--watch"]) == 2
    assert "has finished; leave --watch out" in capsys.readouterr().err


# What a run leaves, stage by stage.
GROWS = ["recipe.yaml", "direction.json", "verdict.json", "tokens.json", "metrics.jsonl", "before_after.json"]
GROWS += ["outcome.json", "transcripts.jsonl", "manifest.json", "timing.json"]
SHOWS = [
    ("", set(), 0),
    ("recipe.yaml", set(), 1),
    ("direction.json", {"direction", "frontier"}, 2),
    ("verdict.json", {"verdict"}, 2),
    ("tokens.json", {"tokens"}, 3),
    ("metrics.jsonl", {"training"}, 4),
    ("before_after.json", {"refusals", "capability", "drift"}, 4),
    ("outcome.json", set(), 4),
    ("transcripts.jsonl", set(), 4),
    ("manifest.json", set(), 4),
    ("timing.json", set(), 5),
]


def drawn(page):
    return {a["id"].removeprefix("figure-") for tag, a in page.tags if tag == "figure"}


def page_of(going, tmp_path):
    page, more = going()
    (tmp_path / "page.html").write_bytes(page)
    return Page(tmp_path / "page.html"), more


@pytest.fixture
def at_once(monkeypatch):
    """Drawn again at each request, if files changed."""
    monkeypatch.setattr(report, "REDRAWN", 0.0)


@pytest.fixture
def sketches(monkeypatch):
    """No picture is drawn, which would take seconds; what was asked for."""
    from safesteer_mlx.evals import figures

    asked = []

    def picture(draw, print_too=True):
        asked.append(print_too)
        return figures.Picture(b"<svg/>", b"<svg/>", b"")

    monkeypatch.setattr(figures, "picture", picture)
    return asked


@pytest.mark.parametrize("text", ["plain", HOSTILE], ids=["plain", "hostile"])
def test_a_run_is_drawn_as_far_as_it_has_come(text, tmp_path, at_once):
    """At every stage of its folder, by one page that grows; nothing of an answer is in it."""
    folder, found, figures = tmp_path / "run", files(text), set()
    folder.mkdir()
    going = GoingRun(folder)
    for i, (name, new, done) in enumerate(SHOWS):
        if name:
            write_run(folder, {name: found[name]})
            os.utime(folder / name, ns=(10**9 * (100 + i),) * 2)
        page, more = page_of(going, tmp_path)
        figures |= new
        assert drawn(page) == figures, name
        assert more is (name != "timing.json")
        told = page.text.count(": done") if more else 5
        assert told == done, name
        assert ("being aligned" in page.text) is more and ("talk to it" in page.text) is not more
        assert "'s answer" not in page.text and not any(a.get("href") == "transcripts.jsonl" for _, a in page.tags)
        assert not {tag for tag, _ in page.tags} & {"script", "iframe", "form"}
    assert "verdict: safer" in page.text


def test_the_page_grows_with_the_steps(tmp_path, at_once, sketches):
    found = {name: content for name, content in files().items() if name in GROWS[:4]}
    rows = [row | {"steps": 9} for row in files()["metrics.jsonl"]]
    folder = write_run(tmp_path / "run", found)
    with PageServer(GoingRun(folder)) as serving:
        for n in (1, 2, 3):
            write_run(folder, {"metrics.jsonl": rows[:n]})
            os.utime(folder / "metrics.jsonl", ns=(2 * 10**18 + n,) * 2)
            with OPEN(serving.address) as answer:
                assert f"step {n} of 9" in answer.read().decode()


def test_it_is_drawn_only_if_asked_and_changed_and_not_too_often(tmp_path, monkeypatch, sketches):
    folder = write_run(tmp_path, {name: content for name, content in files().items() if name in GROWS[:5]})
    calls, real = [], report._page
    monkeypatch.setattr(report, "_page", lambda *a, **how: calls.append(1) or real(*a, **how))
    going, clock = GoingRun(folder), [1000.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: clock[0])
    assert not calls
    first = going()
    clock[0] += 100
    assert going() == first and len(calls) == 1  # nothing changed
    os.utime(folder / "metrics.jsonl", ns=(2 * 10**18,) * 2)
    clock[0] += 100
    going()
    assert len(calls) == 2
    os.utime(folder / "metrics.jsonl", ns=(2 * 10**18 + 1,) * 2)
    clock[0] += report.REDRAWN / 2
    going()
    assert len(calls) == 2  # too soon
    clock[0] += report.REDRAWN
    going()
    assert len(calls) == 3


def test_a_figure_is_drawn_again_only_if_its_file_changed(tmp_path, at_once, sketches):
    folder = write_run(tmp_path, {name: content for name, content in files().items() if name in GROWS[:5]})
    going = GoingRun(folder)
    going()
    assert sketches == [False] * 5
    os.utime(folder / "metrics.jsonl", ns=(2 * 10**18,) * 2)
    going()
    assert sketches == [False] * 6


def test_an_earlier_runs_files_are_left_out(tmp_path, at_once, sketches):
    folder = write_run(tmp_path / "run", files())
    page, more = page_of(GoingRun(folder, since=time.time() + 60), tmp_path)
    assert more and not drawn(page) and "It has just begun." in page.text
    os.utime(folder / "recipe.yaml", ns=(2 * 10**18,) * 2)  # written anew: what is older was found with others
    os.utime(folder / "direction.json", ns=(2 * 10**18 + 1,) * 2)
    page, more = page_of(GoingRun(folder), tmp_path)
    assert more and drawn(page) == {"direction", "frontier"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokens.json", "[\n{]"),
        ("metrics.jsonl", '{"step": 1}\n'),
        ("direction.json", "{}"),
        ("verdict.json", "[]"),
        ("before_after.json", "{}"),
        ("recipe.yaml", "a: [\n"),
        ("recipe.yaml", "teacher: 5\n"),
        ("manifest.json", "3"),
        ("timing.json", "{}"),
        ("outcome.json", '{"words": [], "head": [], "rows": []}'),
    ],
)
def test_a_damaged_file_is_one_sentence_on_the_page(name, content, tmp_path, at_once, sketches):
    folder = write_run(tmp_path / "run", files())
    (folder / name).write_text(content)
    for each in folder.iterdir():
        os.utime(each, ns=(10**18,) * 2)
    page, _ = page_of(GoingRun(folder), tmp_path)
    assert "being aligned" in page.text and ("make the run again" in page.text or "mend it" in page.text)
    assert not drawn(page)


def test_answers_are_on_the_page_only_if_asked_for_and_at_the_end(tmp_path, at_once, sketches):
    found = files()
    folder = write_run(tmp_path / "run", found | {"timing.json": None})
    assert "'s answer" not in page_of(GoingRun(folder, transcripts=True), tmp_path)[0].text
    write_run(folder, {"timing.json": found["timing.json"]})
    page, _ = page_of(GoingRun(folder, transcripts=True), tmp_path)
    assert "base's answer" in page.text and "Warning" in page.text
    assert not any(tag == "details" and "open" in a for tag, a in page.tags)


def test_a_run_elsewhere_is_watched_until_it_has_finished(tmp_path, capsys):
    found = files()
    folder = write_run(tmp_path / "run", found | {"timing.json": None})
    threading.Timer(0.3, write_run, [folder, {"timing.json": found["timing.json"]}]).start()
    assert report.main([str(tmp_path), "--watch"]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("watch it, on this computer alone: http://127.0.0.1:") and last == "the run has finished"


def test_each_step_of_a_run_is_told():
    from safesteer_mlx.recipe import PACKAGE, STEPS

    assert (PACKAGE / "align.py").read_text().count("screen.step(STEPS)") == len(STEPS)


@pytest.mark.usefixtures("few_prompts")
def test_align_serves_its_page_while_it_works(tmp_path, monkeypatch, capsys):
    """The page is asked for after each step; the address is printed once, on loopback, nothing else listens, and
    nothing at all afterwards."""
    from safesteer_mlx.system.screen import Screen

    seen, addresses, listening = [], [], []

    @contextmanager
    def noting(folder, transcripts, port, tell):
        with watching(folder, transcripts, port, lambda text: (tell(text), addresses.append(text.split()[-1]))):
            yield

    def detail(self, text):
        assert [address for own, address in listening if own.fileno() >= 0] == ["127.0.0.1"]
        with OPEN(addresses[0]) as answer:
            seen.append((answer.status, answer.read().decode()))

    def listen(self, *waiting, listen=socket.socket.listen):
        listening.append((self, self.getsockname()[0]))
        listen(self, *waiting)

    monkeypatch.setattr(socket.socket, "listen", listen)
    monkeypatch.setattr(report, "watching", noting)
    monkeypatch.setattr(report, "REDRAWN", 0.0)
    monkeypatch.setattr(serve, "REFRESH", 0.1)
    monkeypatch.setattr(Screen, "detail", detail)
    short = ["--iters", "2", "--test-prompts", "4", "--direction-train", "32", "--direction-validation", "16"]
    short += ["--token-samples", "1", "--coeff", "0.7", "--no-report", "--steps-per-report", "1", "--offline"]
    short += ["--watch"]
    assert align(["--adapter-path", str(tmp_path / "adapters"), *short]) in (0, 2)
    assert seen and all(status == 200 for status, _ in seen)
    assert (
        "step 1 of 2" in seen[-1][1] and 'id="figure-training"' in seen[-1][1] and 'id="figure-tokens"' in seen[-1][1]
    )
    assert capsys.readouterr().out.count(addresses[0]) == 1 and {address for _, address in listening} == {"127.0.0.1"}
    with pytest.raises(urllib.error.URLError):
        OPEN(addresses[0])


@pytest.mark.browser
def test_a_browser_shows_the_page_and_looks_again(browser, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(serve, "REFRESH", 1)
    monkeypatch.setattr(report, "REDRAWN", 0.0)
    found = files(HOSTILE)
    folder = write_run(tmp_path / "run", {name: found[name] for name in GROWS[:4]})
    with PageServer(GoingRun(folder)) as serving:
        browser.log("browser"), browser.log("performance")
        browser.show(serving.address)
        assert browser.run("return document.images.length") == 4
        write_run(folder, {name: found[name] for name in GROWS[4:]})
        for _ in range(100):
            if browser.run("return document.images.length") == 8:
                break
            time.sleep(0.1)
        assert browser.run("return [...document.images].every(i => i.complete && i.naturalWidth > 100)")
        assert browser.run("return document.body.innerText").count("verdict: safer") == 1
        time.sleep(1.5)  # it is the last one, and is not asked for again
        asked = [url for url in browser.requests() if not url.startswith("data:")]
        assert set(asked) == {serving.address} and len(asked) < 15
        assert browser.log("browser") == []
