"""The docs: they build as a site that loads nothing from elsewhere, no link is dead, and what is made from the code is
what the code says."""

import ast
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import make_docs
import pytest
import yaml
from chromium import CHROMIUM, DRIVER, MISSING, Browser
from pages import PAGES, ROOT, anchors, links, slug

from safesteer_mlx.recipe import PACKAGE

DOCS = ROOT / "docs"
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copy(ROOT / "mkdocs.yml", folder)
    shutil.copytree(DOCS, folder / "docs")
    build = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(build, cwd=folder, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "No issues found" in said, said[:4000]
    return folder / "site"


# --------------------------------------------------------------------------------------------------
# The site
# --------------------------------------------------------------------------------------------------

# Where a tag names what a browser loads with the page; a link is followed by its reader alone.
LOADED = dict.fromkeys(("script", "img", "iframe", "source", "video", "audio", "embed"), "src")
LOADED |= {"link": "href", "image": "href", "use": "href", "object": "data", "form": "action"}


class Resources(HTMLParser):
    """What a page loads."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.found += [named[LOADED[tag]]] if named.get(LOADED.get(tag, "")) else []
        self.found += [part.split()[0] for part in (named.get("srcset") or "").split(",") if part.strip()]


def built_pages(site: Path) -> list[Path]:
    return sorted(site.rglob("*.html"))


def test_the_site_has_every_page_and_loads_nothing_from_elsewhere(site):
    named = {path.relative_to(site).as_posix() for path in built_pages(site)}
    assert named >= {f"{page.stem}.html" for page in DOCS.glob("*.md")}
    for page in built_pages(site):
        for resource in Resources(page.read_text("utf-8")).found:
            parts = urlsplit(resource)
            assert not parts.scheme and not parts.netloc, f"{page.name} loads {resource}"
            at = site / parts.path.lstrip("/") if parts.path.startswith("/") else page.parent / unquote(parts.path)
            assert not parts.path or at.exists(), f"{page.name} loads {resource}, which is not there"
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style.read_text("utf-8")), style.name


def test_the_search_knows_every_page(site):
    found = {item["location"].partition("#")[0] for item in json.loads((site / "search.json").read_text())["items"]}
    assert found == {f"{page.stem}.html" for page in DOCS.glob("*.md")}


@pytest.mark.parametrize(
    "tag",
    [
        '<script src="https://e.org/a.js">',
        '<img src="//e.org/a.png">',
        '<img srcset="a.png 1x, https://e.org/b.png 2x">',
        '<link rel="stylesheet" href="https://e.org/a.css">',
        '<iframe src="http://e.org">',
        '<object data="https://e.org/a.svg">',
        '<embed src="https://e.org/a">',
        '<video src="https://e.org/a.mp4">',
        '<svg><use href="https://e.org/a.svg#b"/></svg>',
        '<form action="https://e.org">',
    ],
)
def test_what_a_page_would_load_from_elsewhere_is_seen(tag):
    assert any("//e.org" in resource for resource in Resources(tag).found)
    assert not Resources('<a href="https://e.org">x</a>').found


def test_every_page_is_in_the_navigation():
    def files(entries):
        for entry in entries:
            for what in entry.values():
                yield from [what] if isinstance(what, str) else files(what)

    assert sorted(files(CONFIG["nav"])) == sorted(page.name for page in DOCS.glob("*.md"))
    assert CONFIG["strict"] is True and CONFIG["theme"]["font"] is False


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_the_site_and_asks_for_nothing_elsewhere(site, tmp_path, dark):
    assert CHROMIUM and DRIVER, MISSING
    with Browser(tmp_path) as browser:
        browser.log("performance")
        for page in built_pages(site):
            browser.show(page, dark=dark)
            assert browser.run("return [...document.images].every(i => i.complete && i.naturalWidth)"), page.name
        foreign = [url for url in browser.requests() if not url.startswith(("file:", "data:", "blob:"))]
        assert not foreign


# --------------------------------------------------------------------------------------------------
# Links
# --------------------------------------------------------------------------------------------------


def dead(page: Path, text: str) -> list[str]:
    """The links of a page that lead nowhere in the repository, files and anchors."""
    found = []
    for link in links(text):
        parts = urlsplit(link)
        if parts.scheme in ("http", "https", "mailto"):
            continue
        at = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        own = text if at == page else at.read_text("utf-8") if at.suffix == ".md" and at.is_file() else ""
        if not at.exists() or not at.is_relative_to(ROOT) or (parts.fragment and parts.fragment not in anchors(own)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_link_is_dead(page: Path):
    assert not dead(page, page.read_text("utf-8"))


@pytest.mark.parametrize(
    "link",
    [
        "nothing.md",
        "choices.md#nothing",
        "#nothing",
        "figures/nothing.svg",
        "../docs/nothing.md",
        "../../outside.md",
        "verdict.md#The-verdict",
        "see.md#the page",
        "export.md#",
        "glossary.md#refusal-directions",
        "figures",
    ],
)
def test_a_dead_link_is_seen(link: str):
    seen = dead(DOCS / "see.md", f"# The page\n\nRead [this]({link}), not `[that](nowhere.md)`.\n")
    leads_somewhere = link in ("export.md#", "figures", "see.md#the page")  # the last is no link: a space ends it
    assert seen == ([] if leads_somewhere else [link])


@pytest.mark.parametrize(
    ("heading", "anchor"),
    [
        ("The zoo", "the-zoo"),
        ("What came of it, and what that shows", "what-came-of-it-and-what-that-shows"),
        ("A school's homework helper", "a-schools-homework-helper"),
        ("`--bits` and more", "--bits-and-more"),
        ("*Not* aligned", "not-aligned"),
        ("1. Finding it", "1-finding-it"),
        ("align: run", "align-run"),
        ("Speed & size", "speed--size"),
        ("position −1", "position-1"),
        ("Größe", "größe"),
        ("[The page](see.md)", "the-page"),
        ("snake_case", "snake_case"),
    ],
)
def test_anchors_are_githubs(heading: str, anchor: str):
    assert slug(heading) == anchor
    assert anchors(f"# {heading}\n\n## {heading}\n") == {anchor, f"{anchor}-1"}


# --------------------------------------------------------------------------------------------------
# Made from the code
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", make_docs.PAGES)
def test_pages_made_from_the_code_are_what_the_script_writes(name: str):
    assert (DOCS / name).read_text("utf-8") == make_docs.PAGES[name](), "run scripts/make_docs.py"


def test_the_script_says_what_is_stale_and_writes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_docs, "DOCS", tmp_path)
    for argv, code in ((["--check"], 1), ([], 0), (["--check"], 0)):
        monkeypatch.setattr(sys, "argv", ["make_docs.py", *argv])
        assert make_docs.main() == code
    assert {path.name for path in tmp_path.iterdir()} == set(make_docs.PAGES)
    assert "commands.md is not what the code says" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Every sentence of an error has a family
# --------------------------------------------------------------------------------------------------


def _text(node: ast.expr) -> str:
    """A sentence as the code has it, what is filled in as …"""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return "…"


def sentences() -> dict[str, str]:
    """Where -> what, of all sentences that say something themselves."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            name = getattr(node.func, "id", "") if isinstance(node, ast.Call) and node.args else ""
            if name in ("UserError", "PagingError"):
                found[f"{path.relative_to(PACKAGE)}:{node.lineno}"] = _text(node.args[0])
    return {where: text for where, text in found.items() if re.search(r"[a-z]{3}", text)}


def test_every_error_has_a_family_in_troubleshooting():
    lines = (DOCS / "troubleshooting.md").read_text("utf-8").split("## The command line", 1)[1].splitlines()
    cells = [line.split(" | ")[0] for line in lines if line.startswith("| *")]
    words = [word for cell in cells for word in re.findall(r"\*([^*]+)\*", cell)]
    said = sentences()
    alone = {where: text for where, text in said.items() if not any(word in text for word in words)}
    assert not alone, f"give these a row in docs/troubleshooting.md: {alone}"
    unused = [word for word in words if not any(word in text for text in said.values())]
    assert not unused, f"no error says this any more: {unused}"


# --------------------------------------------------------------------------------------------------
# The glossary
# --------------------------------------------------------------------------------------------------


def test_the_glossary_explains_each_word_once_and_shortly():
    rows = re.findall(r"^\| <a id=\"([\w-]+)\"></a>(.+?) \| (.+) \|$", (DOCS / "glossary.md").read_text("utf-8"), re.M)
    words = [word.lower() for _, word, _ in rows]
    assert len(rows) > 30 and words == sorted(words) and len({name for name, _, _ in rows}) == len(rows)
    for _, word, meaning in rows:
        assert len(re.findall(r"[.?!](?= |$)", meaning)) <= 3 and meaning.endswith("."), word
    wanted = (
        "refusal direction, steering coefficient, safety tokens, safety mass, flip rate, anchor, rollout, position −1"
    )
    wanted += ", refusal under ablation, kl, drift, borderline, verdict, teacher, over-refusal"
    assert all(any(term in word for word in words) for term in wanted.split(", "))
