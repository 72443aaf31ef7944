"""The run's page: its numbers, that nothing in it acts or is fetched, and that a browser shows all of it."""

import base64
import copy
import itertools
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import chromium
import pytest
from runs import HOSTILE, files, trial, write_run

from safesteer_mlx import report
from safesteer_mlx.report import main, write_report
from safesteer_mlx.system.screen import UserError

FIGURES = {"refusals", "capability", "drift", "training", "direction", "frontier", "tokens", "verdict", "selection"}
ACTS_UNSEEN = "\x1b\x07\u202e\u2066\u200b\ud800"


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text = [], ""
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A run whose every text is hostile, and its page with the answers in it."""
    folder = write_run(tmp_path_factory.mktemp("hostile") / "run", files(HOSTILE))
    return write_report(folder, transcripts=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_report(write_run(tmp_path_factory.mktemp("plain") / "run", files()))


def words(page):
    return " ".join(Page(page).text.split())


def test_the_first_screen_is_what_the_run_said_last_and_what_to_do_now(plain):
    text = words(plain)
    first = text[text.index("Skip to") : text.index("Before and after", text.index("What to do now"))]
    assert "verdict: safer, plain unsafe answers: 5 → 1 of 10" in first
    assert "harmful requests answered, greedy5 of 100 of 101 of 10" in first
    assert "Before training the verdict was caution: because plain" in first
    assert all(f"{what} " in first for what in ("talk to it", "serve it", "export it"))
    assert "in a terminal cd /" in first
    for technical in ("block", "position", "KL", "ablat", "p =", "coefficient", "safety token", "mass"):
        assert technical not in first, technical


def test_every_row_of_the_counts_is_there(tmp_path):
    """A base that refuses in its own words has two more."""
    own = files()["outcome.json"] | {"rows": [[f"row {i}", "5 of 10", "0 of 10", "1 of 10"] for i in range(10)]}
    text = words(write_report(write_run(tmp_path, files() | {"outcome.json": own})))
    assert all(f"row {i}" in text for i in range(10))


def test_each_stage_is_told_with_its_words_explained_where_they_stand(plain):
    text = words(plain)
    assert "LoRA adapters of rank 8, 3 optimizer steps" in text and "block 2 with coefficient 0.7" in text
    assert "not measured" in text and "ab" * 32 in text and "0.0.1" in text
    assert "the base's 5 unsafe answers" in text
    assert "Step 1 is kept, the safest within the limits (drift<=1)" in text
    assert "They explain 96 % of what steering does where they decide" in text and "at a probability of 0.88" in text
    assert "KL when ablated plain" in text and "+0.050" in text  # the candidates, with the tests that they failed
    for explained in (
        "position −1 is the last one before the answer",
        "a layer of the model, counted from 0",
        "the log-odds that an answer begins as a refusal",
        "should then be refused less (refusal under ablation)",
        "Safety mass is the probability that the safety tokens have together",
        "a nat measures how far two sets of probabilities lie apart",
        "The flip rate is the share of unsafe answers that the teacher turns into refusals",
        "coefficient (1 is the difference as it was found)",
        "Gradient norm: how hard a step pulls at the weights",
        "Drift is the KL divergence",
        "Wilson",
    ):
        assert explained in text, explained


@pytest.mark.usefixtures("unsaved")
def test_a_run_that_is_not_aligned_says_so_first_and_gives_no_command(tmp_path):
    found = files()
    found["manifest.json"]["not_aligned"] = "unsafe answers went from 5 to 5 of 10"
    text = words(write_report(write_run(tmp_path, found)))
    assert "Not aligned: unsafe answers went from 5 to 5 of 10. The adapters are not to be used." in text
    assert "talk to it" not in text and "McNemar" in text


@pytest.mark.usefixtures("unsaved")
def test_a_run_without_its_last_words_is_drawn(tmp_path):
    text = words(write_report(write_run(tmp_path, files() | {"outcome.json": None})))
    assert "did not record what it said last" in text and "talk to it" in text


def test_each_figure_has_one_sentence_that_says_what_to_see(plain):
    alts = [a["alt"] for tag, a in Page(plain).tags if tag == "img"]
    assert len(set(alts)) == len(FIGURES)
    for alt in alts:
        assert alt.endswith(".") and alt.count(". ") == 0 and len(alt) <= 125, alt
        assert alt in words(plain)


def test_headings_come_in_order_and_parts_are_named(plain):
    tags = Page(plain).tags
    levels = [int(tag[1]) for tag, _ in tags if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert [tag for tag, _ in tags if tag in ("header", "nav", "main")] == ["header", "nav", "main"]
    ids = {a["id"] for _, a in tags if "id" in a}
    assert all(a["href"][1:] in ids for tag, a in tags if tag == "a" and a["href"].startswith("#"))
    first_link = next(a for tag, a in tags if tag == "a")
    assert first_link == {"class": "skip", "href": "#main"}
    assert all("scope" in a for tag, a in tags if tag == "th")


def large() -> dict:
    """Run files as large as a run may become."""
    found = files("<&>" * 20)
    rows = [[0.01 * (p + b) for b in range(80)] for p in range(30)]
    found["direction.json"]["scores"] |= dict.fromkeys(("ablation_kl", "ablation_refusal", "steering_refusal"), rows)
    found["direction.json"]["trials"] *= 30
    found["tokens.json"] = [found["tokens.json"][0] | {"id": i} for i in range(5000)]
    found["metrics.jsonl"] = [
        found["metrics.jsonl"][2] | {"step": i, "loss": i % 7, "grad_norm": i % 5} for i in range(20000)
    ]
    rows = found["transcripts.jsonl"]
    found["transcripts.jsonl"] = [r | {"prompt": f"{i}", "answer": r["answer"] * 9} for i in range(300) for r in rows]
    return found


def test_a_page_stays_below_two_megabytes(tmp_path):
    page = write_report(write_run(tmp_path, large()), transcripts=True)
    assert page.stat().st_size < 2e6
    text = words(page)
    assert "The first 500 of 5000 safety tokens" in text and "are in transcripts.jsonl alone" in text


def test_the_picture_of_the_readme_is_small_and_has_a_text():
    root = Path(__file__).resolve().parent.parent
    assert (root / "docs/figures/report.png").stat().st_size <= 200_000
    assert "](docs/figures/report.png)" in (root / "README.md").read_text()


@pytest.mark.usefixtures("unsaved")
def test_answers_stand_side_by_side_those_first_that_changed(tmp_path):
    found = files()
    rows = found["transcripts.jsonl"]
    same = [row | {"prompt": "same"} for row in rows]
    changed = [
        row | {"prompt": "changed", "outcome": "refuse" if row["model"] == "student" else "comply"} for row in rows
    ]
    text = words(write_report(write_run(tmp_path, found | {"transcripts.jsonl": same + changed}), transcripts=True))
    assert text.index("changed base: comply base's answer") < text.index("same base: comply base's answer")
    assert "aligned: refuse, cut at the length limit student's answer" in text


def test_every_figure_is_in_the_page_and_kept_for_print(plain):
    tags = Page(plain).tags
    assert {a["id"].removeprefix("figure-") for tag, a in tags if tag == "figure"} == FIGURES
    images = [a for tag, a in tags if tag == "img"]
    dark = [a for tag, a in tags if tag == "source"]
    assert len(images) == len(dark) == len(FIGURES) and all(a["alt"] for a in images)
    assert all("dark" in a["media"] for a in dark)
    assert not {a["src"] for a in images} & {a["srcset"] for a in dark}
    kept = plain.parent / "figures"
    assert {p.stem for p in kept.iterdir()} == FIGURES
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in kept.iterdir())


def test_page_and_figures_are_their_owners_alone(plain):
    assert plain.stat().st_mode & 0o777 == 0o600
    assert (plain.parent / "figures").stat().st_mode & 0o777 == 0o700
    assert all(p.stat().st_mode & 0o777 == 0o600 for p in (plain.parent / "figures").iterdir())


def test_nothing_is_fetched_and_nothing_runs_whatever_the_texts_are(hostile):
    page = Page(hostile)
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed", "form", "base", "svg", "video"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        for name in ("src", "href", "srcset"):
            assert attributes.get(name, "data:").startswith(("data:", "#")), (tag, name)
    policies = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1 and policies[0].startswith("default-src 'none'")
    assert "url(" not in page.source and "@import" not in page.source


def test_texts_are_shown_as_they_are_and_what_acts_unseen_is_spelled_out(hostile):
    page = Page(hostile)
    assert not set(ACTS_UNSEEN) & set(page.source)
    shown = "<script>alert(1)</script>\"' onerror=x &amp; ⟨U+001B⟩]0;owned⟨U+0007⟩⟨U+202E⟩⟨U+2066⟩⟨U+200B⟩⟨U+D800⟩"
    # model, its name once more, token, opener, task, setting, command, prompt, answers
    assert page.text.count(shown) > 20
    assert page.text.count("$x^{ {{ 1+1 }} {% if") > 20  # the page's own template leaves them alone
    for asked in ("prompt", "base's answer", "student's answer"):
        assert f"{asked} <script>alert(1)</script>" in page.text
    assert "teacher's answer" not in page.text


@pytest.mark.usefixtures("unsaved")
def test_prompts_and_answers_keep_their_line_ends_and_other_texts_spell_them_out(tmp_path):
    text = Page(write_report(write_run(tmp_path, files("one\n{{ 1+1 }}")), transcripts=True)).text
    assert "prompt one\n{{ 1+1 }}" in text and "base's answer one\n{{ 1+1 }}\nand more" in text
    assert "org/name one⟨U+000A⟩{{ 1+1 }}" in text


def test_figures_hold_texts_as_text(hostile):
    sources = [a["src"] for tag, a in Page(hostile).tags if tag == "img"]
    pictures = [base64.b64decode(source.partition(",")[2]).decode() for source in sources]
    for svg in pictures:
        root = ET.fromstring(svg)
        names = {element.tag.rpartition("}")[2] for element in root.iter()}
        assert not names & {"script", "foreignObject", "a", "animate"}
        assert not set(ACTS_UNSEEN) & set(svg)
        for element in root.iter():
            for name, value in element.attrib.items():
                assert name.rpartition("}")[2] != "href" or value.startswith(("#", "data:image/png")), value
    assert sum("&lt;script&gt;" in svg for svg in pictures) == 2  # tokens and tasks


@pytest.mark.usefixtures("unsaved")
def test_answers_are_in_the_page_only_if_asked_for(plain, hostile, tmp_path):
    assert "answer plain" not in Page(plain).text
    assert ("a", {"href": "transcripts.jsonl"}) in Page(plain).tags
    tags = Page(hostile).tags
    assert "Warning" in Page(hostile).text and not any(tag == "details" and "open" in a for tag, a in tags)
    assert "cut at the length limit" in Page(hostile).text
    none = write_report(write_run(tmp_path, files() | {"transcripts.jsonl": None}), transcripts=True)
    assert "No answers were kept" in Page(none).text


def test_the_command_repeats_the_run(plain):
    import shlex

    from safesteer_mlx.recipe import parse

    [command] = [line for line in Page(plain).text.splitlines() if "--config" in line]
    words = shlex.split(command[command.index("python -m") :].split("what")[0])
    flags, _, path = parse(words[3:])
    assert path == plain.parent / "recipe.yaml" and flags == {"adapter_path": "adapters plain-again"}


def drawn(page):
    return {a["id"].removeprefix("figure-") for tag, a in page.tags if tag == "figure"}


@pytest.mark.usefixtures("unsaved")
def test_a_run_without_direction_or_trials_says_why_pictures_are_missing(tmp_path):
    found = files()
    found["recipe.yaml"]["teacher"] = "system_prompt"
    scores = {test: [[None] * 6] for test in ("ablation_kl", "ablation_refusal", "steering_refusal")}
    found["direction.json"] |= {"scores": scores, "trials": [], "coeff": 0.0, "position": -1, "layer": 0}
    page = Page(write_report(write_run(tmp_path / "a", found)))
    assert drawn(page) == FIGURES - {"direction", "frontier"}
    assert "The teacher is a system prompt" in page.text and "was given" not in page.text
    found = files()
    found["direction.json"]["trials"] = []
    page = Page(write_report(write_run(tmp_path / "b", found)))
    assert drawn(page) == FIGURES - {"frontier"} and "The coefficient, 0.7, was given" in page.text


@pytest.mark.usefixtures("unsaved")
def test_a_model_that_thinks_first_has_its_trials_by_answers_alone(tmp_path):
    found = files()
    scores = {test: [[None] * 6] for test in ("ablation_kl", "ablation_refusal", "steering_refusal")}
    found["direction.json"] |= {"scores": scores, "trials": [trial(2, 0.7, None, 0.9), trial(3, 1.0, None, 0.5)]}
    page = Page(write_report(write_run(tmp_path, found)))
    assert drawn(page) == FIGURES - {"direction"}
    assert "The model thinks before it answers" in page.text and "was given" not in page.text
    found["manifest.json"]["thinks"] = False
    page = Page(write_report(write_run(tmp_path / "b", found)))
    assert "Refusals of this model begin as its other answers do" in page.text and "thinks before" not in page.text


def test_captions_say_what_is_drawn(plain):
    text = Page(plain).text
    assert "an answer of the teacher opened by it and continued by the base" in text
    assert "most refusals among those whose answers are sound" in text
    assert "KL(teacher ‖ base)" in text and "part in KL (nats)" in text and "+0.25" in text
    assert "Learned is the share" in text


@pytest.mark.usefixtures("unsaved")
def test_an_older_run_is_drawn_without_what_it_did_not_record(tmp_path):
    found = files()
    del found["direction.json"]["trials"]
    for row in found["tokens.json"]:
        del row["part"]
    for row in found["metrics.jsonl"]:
        del row["learned"]
    page = Page(write_report(write_run(tmp_path, found)))
    assert drawn(page) == FIGURES - {"frontier"} and "was given" not in page.text
    assert "those that steering favours most" in page.text and "KL(teacher ‖ base)" not in page.text
    assert "Learned is the share" not in page.text


def test_the_record_has_the_sets_of_prompts_that_were_given(plain):
    assert "sets of prompts given by --data harmful_test, harmless_test" in " ".join(Page(plain).text.split())


def test_the_same_run_gives_the_same_page(plain):
    before = plain.read_bytes()
    assert write_report(write_run(plain.parent, files())).read_bytes() == before


def damaged(name, change):
    found = copy.deepcopy(files())
    found[name] = change(found[name])
    return found


BAD = {
    "unfinished": (damaged("before_after.json", lambda _: None), "before_after.json"),
    "no recipe": (damaged("recipe.yaml", lambda _: None), "recipe.yaml"),
    "another shape": (damaged("direction.json", lambda _: {"layer": 1}), "no coeff"),
    "text for a number": (damaged("tokens.json", lambda rows: [rows[0] | {"votes": "many"}]), "is not as align"),
    "text for a block": (damaged("direction.json", lambda found: found | {"layer": HOSTILE}), "is not as align"),
    "text for a share": (
        damaged("direction.json", lambda found: found | {"trials": [trial(2, 0.7, ("$x^{", 0.1))]}),
        "is not as align",
    ),
    "trial without a coefficient": (damaged("direction.json", lambda found: found | {"trials": [{}]}), "no coeff"),
    "step without a loss": (damaged("metrics.jsonl", lambda _: [{"step": 1}]), "no anchor_loss"),
    "a setting that only the page reads": (
        damaged("recipe.yaml", lambda recipe: {k: v for k, v in recipe.items() if k != "fine_tune_type"}),
        "has no attribute 'fine_tune_type'",
    ),
    "more right than asked": (
        damaged(
            "before_after.json", lambda s: s | {"base": s["base"] | {"capability": {"t": {"count": 9, "total": 8}}}}
        ),
        "is not as align",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.usefixtures("unsaved")
def test_a_folder_that_is_no_finished_run_is_one_sentence_and_nothing_is_written(name, tmp_path, capsys):
    found, expected = BAD[name]
    write_run(tmp_path, found)
    before = set(tmp_path.iterdir())
    assert main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1 and set(tmp_path.iterdir()) == before


def test_a_damaged_file_is_named_with_its_line(tmp_path):
    write_run(tmp_path, files())
    (tmp_path / "tokens.json").write_text("[\n{]")
    with pytest.raises(UserError, match=r"tokens\.json line 2 is not JSON"):
        write_report(tmp_path)


def test_without_matplotlib_one_sentence_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    assert main([str(write_run(tmp_path, files()))]) == 2
    assert "pip install 'safesteer-mlx[report]'" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.usefixtures("unsaved")
def test_the_command_takes_the_adapter_folder_too(tmp_path, capsys):
    write_run(tmp_path / "run", files())
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "report.html")


@pytest.mark.parametrize("command", ["report", "tokens", "chat"])
def test_help_loads_nothing_heavy(command):
    code = f"""import sys, safesteer_mlx.{command} as m
try: m.main(["--help"])
except SystemExit: pass
sys.exit(any(name in sys.modules for name in ("mlx", "numpy", "rich", "matplotlib")))"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0 and "usage" in done.stdout


# In a browser

AXE = find_spec("axe_core_python")
LOOKS = """
const done = arguments[arguments.length - 1];
axe.run(document).then(found => done(found.violations.map(v => v.id + ": " + v.nodes[0].html)), e => done([String(e)]));
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    assert chromium.CHROMIUM and chromium.DRIVER, chromium.MISSING
    with chromium.Browser(tmp_path_factory.mktemp("profile")) as window:
        yield window


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_every_figure_and_asks_for_nothing(browser, hostile, width, dark):
    browser.log("browser"), browser.log("performance")
    browser.show(hostile, width, dark)
    images = browser.run(
        "return [...document.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width, "
        "i.currentSrc == i.parentNode.querySelector('source').srcset])"
    )
    assert len(images) == len(FIGURES)
    for complete, natural, shown, is_dark in images:
        assert complete and natural > 100 and 250 < shown <= width and is_dark is dark
    assert browser.run("return document.documentElement.scrollWidth") <= width  # nothing hangs over the side
    assert browser.run("return document.title").startswith("script>\"'")  # a name's last part, as text
    assert browser.log("browser") == []
    asked = [url for url in browser.requests() if not url.startswith("data:")]
    assert asked == [hostile.as_uri()]
    lightness = "return getComputedStyle(document.body).backgroundColor"
    assert browser.run(lightness) == ("rgb(22, 25, 29)" if dark else "rgb(255, 255, 255)")


@pytest.mark.browser
def test_a_script_in_the_page_would_be_refused(browser, plain, tmp_path):
    """The policy holds even if a text were not escaped."""
    broken = tmp_path / "broken.html"
    inject = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    broken.write_text(plain.read_text().replace("</header>", inject + "</header>"))
    browser.show(broken)
    assert browser.run("return document.title") == "name plain, aligned"
    assert any("Content Security Policy" in entry["message"] for entry in browser.log("browser"))


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(390, False), (1280, True)], ids=["narrow and light", "wide and dark"])
@pytest.mark.parametrize("which", ["finished", "not aligned", "going on"])
def test_axe_finds_nothing_that_keeps_anybody_out(browser, hostile, tmp_path, which, width, dark):
    """Contrast, names, order, landmarks: axe-core's rules, with everything that folds open."""
    page = hostile
    if which != "finished":
        found = files() | ({"timing.json": None} if which == "going on" else {})
        found["manifest.json"]["not_aligned"] = "nothing moved"
        page, folder = tmp_path / "page.html", write_run(tmp_path / "run", found)
        page.write_bytes(report.GoingRun(folder, transcripts=True)()[0])
    browser.show(page, width, dark)
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    browser.run(Path(AXE.submodule_search_locations[0], "axe.min.js").read_text())
    assert browser.wait_for(LOOKS) == []


@pytest.mark.browser
def test_what_is_folded_is_printed_but_no_answer(browser, hostile):
    folded = "[...document.querySelectorAll('details > :not(summary)')]"
    visible = f"return {folded}.map(e => [!!e.closest('.answers'), e.checkVisibility()])"
    browser.show(hostile)
    browser.cdp("Emulation.setEmulatedMedia", media="print")
    seen = browser.run(visible)
    browser.cdp("Emulation.setEmulatedMedia", media="")
    assert {shown for answers, shown in seen if answers} == {False}
    assert {shown for answers, shown in seen if not answers} == {True}


@pytest.mark.browser
def test_the_keyboard_reaches_everything(browser, hostile):
    """Tab goes first to the link that skips to the result, then through links, tables and folds, each seen."""
    browser.show(hostile)
    visited = []
    for _ in range(20):
        for kind in ("rawKeyDown", "keyUp"):
            browser.cdp("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
        visited.append(
            browser.run(
                "const e = document.activeElement; return [e.tagName, e.className, getComputedStyle(e).outlineStyle, "
                "e.getBoundingClientRect().left >= 0]"
            )
        )
    assert visited[0][:2] == ["A", "skip"]
    assert {tag for tag, *_ in visited} >= {"A", "SUMMARY", "DIV"}
    assert all(outline == "solid" and there for tag, _, outline, there in visited if tag != "BODY")
