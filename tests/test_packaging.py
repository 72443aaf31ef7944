"""What a newcomer gets: the wheel, the installed command, the pins, and a set-up that mends itself."""

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import threading
import time
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from runs import PROMPTS, few_sets

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# The least that ends in adapters: adjust here when the flags of `align` change.
SHORTEST_RUN = ("--iters", "1", "--test-prompts", "4", "--coeff", "0.85", "--token-samples", "1", "--horizon", "2")
SHORTEST_RUN += ("--data", "few", "--no-report")


def run(*command: object, **settings) -> subprocess.CompletedProcess:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **settings)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


# --------------------------------------------------------------------------------------------------
# The wheel and the sdist
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build = ("pip", "wheel", ROOT, "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", out)
    run(sys.executable, "-m", *build)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def target(wheel, tmp_path_factory) -> Path:
    """The wheel installed by itself in another folder."""
    out = tmp_path_factory.mktemp("target")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-q", "--target", out, wheel)
    return out


def elsewhere(target: Path) -> dict[str, str]:
    """An environment that imports the package from the target, without the network."""
    return os.environ | {"PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def test_wheel_holds_package_models_data_licence_and_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
        commands = archive.read(entry_points).decode()
        metadata = archive.read(entry_points.replace("entry_points.txt", "METADATA")).decode()

    wanted = [path.relative_to(ROOT) for path in ROOT.glob("safesteer_mlx/**/*.py")]
    wanted += [path.relative_to(ROOT) for path in ROOT.glob("safesteer_mlx/data/**/*") if path.is_file()]
    recipes = [Path("safesteer_mlx") / path.relative_to(ROOT) for path in ROOT.glob("models/*.yaml")]
    bundled = [
        Path("safesteer_mlx") / path.relative_to(ROOT)
        for path in ROOT.glob("models/tiny-chat/**/*")
        if path.is_file() and not path.name.startswith(".")
    ]
    assert recipes and any("/data/" in path.as_posix() for path in wanted + bundled)
    missing = {path.as_posix() for path in [*wanted, *recipes, *bundled]} - names
    assert not missing
    assert "safesteer_mlx/models/tiny-chat/model.safetensors" in names
    assert any(name.startswith("safesteer_mlx/data/") and name.endswith(".jsonl") for name in names)
    assert any(name.startswith("safesteer_mlx/models/tiny-chat/data/") for name in names)
    assert "safesteer_mlx/py.typed" in names
    assert "safesteer-mlx = safesteer_mlx.cli:main" in commands
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert "Project-URL: Paper, https://arxiv.org/abs/2606.02530" in metadata
    assert not {name for name in names if not name.startswith(("safesteer_mlx/", "safesteer_mlx-"))}
    assert not {name for name in names if Path(name).name.startswith("test_")}
    assert not {name for name in names if "__pycache__" in name}


def test_sdist_is_complete(tmp_path):
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", tmp_path, ROOT)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "pyproject.toml",
        "constraints.txt",
        "LICENSE",
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "CITATION.cff",
    }
    wanted |= {"scripts/align", "scripts/test", "scripts/setup", "scripts/setup_venv.py", ".ci/run", "mkdocs.yml"}
    for folder in ("safesteer_mlx", "models", "tests", "docs", "examples"):
        wanted |= {
            path.relative_to(ROOT).as_posix()
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
        }
    assert not wanted - names
    assert not {name for name in names if name.startswith((".venv", "adapters"))}


def test_installed_wheel_answers_help_from_its_own_files(target, tmp_path):
    env = elsewhere(target)
    help_text = run(sys.executable, "-m", "safesteer_mlx.align", "--help", cwd=tmp_path, env=env).stdout
    assert "--adapter-path" in help_text
    code = "import safesteer_mlx.align as align; print(align.__file__)"
    found = Path(run(sys.executable, "-c", code, cwd=tmp_path, env=env).stdout.strip())
    assert found == target / "safesteer_mlx" / "align.py"
    assert (found.parent / "models" / "tiny-chat" / "config.json").is_file()
    command = target / "bin" / "safesteer-mlx"
    assert "--adapter-path" in run(command, "align", "--help", cwd=tmp_path, env=env).stdout
    assert run(command, "--version", cwd=tmp_path, env=env).stdout == f"safesteer-mlx {PROJECT['version']}\n"


def test_installed_wheel_aligns_the_bundled_model(target, tmp_path):
    """Adjust SHORTEST_RUN, not this, when flags change."""
    adapters = tmp_path / "adapters"
    command = (sys.executable, "-m", "safesteer_mlx.align", "--adapter-path", adapters, *SHORTEST_RUN)
    done = run(*command, cwd=few_sets(tmp_path, prompts=PROMPTS), env=elsewhere(target), stdin=subprocess.DEVNULL)
    assert (adapters / "adapters.safetensors").stat().st_size > 0
    assert json.loads((adapters / "adapter_config.json").read_text())["fine_tune_type"] == "lora"
    # nothing of the checkout was used
    said = done.stdout + done.stderr
    recorded = "".join(path.read_text() for path in adapters.rglob("*") if path.suffix in (".json", ".yaml"))
    assert str(ROOT / "models") not in said + recorded


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------


def test_help_is_quick():
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        run(sys.executable, "-m", "safesteer_mlx.align", "--help")
        seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds) < 0.3, seconds


def test_help_imports_nothing_heavy():
    code = (
        "import json, sys\n"
        "from safesteer_mlx.align import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})), file=sys.stderr)"
    )
    imported = set(json.loads(run(sys.executable, "-c", code).stderr.splitlines()[-1]))
    assert "safesteer_mlx" in imported
    heavy = {"mlx", "mlx_lm", "transformers", "tokenizers", "numpy", "huggingface_hub", "sentencepiece"}
    assert not imported & heavy


def test_versions_agree():
    import safesteer_mlx

    assert PROJECT["version"] == importlib.metadata.version("safesteer-mlx") == safesteer_mlx.__version__


# --------------------------------------------------------------------------------------------------
# The pins
# --------------------------------------------------------------------------------------------------


def requirements() -> list[Requirement]:
    # PyTorch and what needs it are neither installed nor pinned here.
    extras = [needs for extra, needs in PROJECT["optional-dependencies"].items() if extra not in ("eval", "export")]
    return [Requirement(text) for text in [*PROJECT["dependencies"], *(text for extra in extras for text in extra)]]


def pins() -> dict[str, Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return {canonicalize_name(pin.name): pin for pin in map(Requirement, filter(None, lines))}


def version_of(pin: Requirement) -> str:
    (specifier,) = pin.specifier
    assert specifier.operator == "==", pin
    return specifier.version


def test_every_dependency_has_a_lower_bound_and_a_pin_within_it():
    for requirement in requirements():
        assert [specifier.operator for specifier in requirement.specifier] == [">="], requirement
        assert version_of(pins()[canonicalize_name(requirement.name)]) in requirement.specifier


def test_the_pins_cover_what_the_dependencies_need_in_turn():
    """Walks the installed metadata, on whatever platform this is."""
    todo, seen = requirements(), set()
    while todo:
        requirement = todo.pop()
        extras = requirement.extras or {""}
        if requirement.marker and not any(requirement.marker.evaluate({"extra": e}) for e in extras):
            continue
        name = canonicalize_name(requirement.name)
        if requirement.extras & {"cuda13"} or (name, *extras) in seen:
            continue  # CUDA's libraries are not pinned: they follow from mlx's own version
        seen.add((name, *extras))
        assert name in pins(), f"{requirement} is not in constraints.txt"
        for text in importlib.metadata.requires(name) or []:
            child = Requirement(text)
            if not child.marker or any(child.marker.evaluate({"extra": e}) for e in extras):
                child.marker = None
                todo.append(child)


def test_backends_are_pinned_to_their_own_platforms_and_to_mlx():
    for name, system in (("mlx-cpu", "Linux"), ("mlx-metal", "Darwin")):
        pin = pins()[name]
        assert version_of(pin) == version_of(pins()["mlx"])
        assert pin.marker
        assert [pin.marker.evaluate({"platform_system": s}) for s in ("Linux", "Darwin")] == [
            system == "Linux",
            system == "Darwin",
        ]


def test_one_lowest_python_everywhere():
    (specifier,) = Requirement(f"python{PROJECT['requires-python']}").specifier
    lowest = tuple(map(int, specifier.version.split(".")))
    tree = ast.parse((ROOT / "scripts" / "setup_venv.py").read_text())
    assigned = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    assert ast.literal_eval(assigned["MINIMUM"]) == lowest
    assert f"sys.version_info < {lowest}" in (ROOT / "scripts" / "setup").read_text()


# --------------------------------------------------------------------------------------------------
# What a repository's visitors read
# --------------------------------------------------------------------------------------------------


def test_the_citation_names_this_version_and_the_paper():
    ours = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(ours["cff-version"]) == "1.2.0" and ours["message"]
    assert (ours["type"], ours["version"], ours["license"]) == ("software", PROJECT["version"], PROJECT["license"])
    assert ours["authors"] == PROJECT["authors"]
    (paper,) = ours["references"]
    assert paper["type"] == "article" and paper["title"].startswith("SafeSteer: ")
    assert [identifier["value"] for identifier in paper["identifiers"]] == ["arXiv:2606.02530"]
    assert paper["url"] == PROJECT["urls"]["Paper"]
    assert paper["authors"] and all(author.keys() == {"given-names", "family-names"} for author in paper["authors"])


def test_the_changelog_says_what_is_unreleased_or_this_version():
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert headings[0] == "## [Unreleased]"
    assert len(headings) == 1 or headings[1].startswith(f"## [{PROJECT['version']}] - ")


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda p: p.stem)
def test_issue_templates_are_forms_that_github_takes(path):
    form = yaml.safe_load(path.read_text())
    if path.stem == "config":
        assert isinstance(form["blank_issues_enabled"], bool)
        return
    assert form["name"] and form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in fields} <= {"input", "textarea", "dropdown", "checkboxes"}
    names = [field["id"] for field in fields]
    assert len(set(names)) == len(names) > 0
    for field in form["body"]:
        assert field["attributes"]["value" if field["type"] == "markdown" else "label"]
        # unquoted, `yes` and `no` are booleans, which a form refuses
        assert all(isinstance(option, str) for option in field["attributes"].get("options", []))


def test_figures_from_a_mac_are_asked_for_whole():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "mac_figures.yml").read_text())
    asked = {field.get("id") for field in form["body"]}
    assert asked >= {"machine", "memory", "macos", "mlx", "model", "command", "seconds", "peak", "bench"}


def test_pre_commit_has_the_pinned_ruff_and_leaves_models_and_data_alone():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    revisions = {Path(repo["repo"]).name: repo["rev"] for repo in config["repos"]}
    assert revisions["ruff-pre-commit"] == f"v{version_of(pins()['ruff'])}"
    for path in (
        "models/tiny-chat/tokenizer.json",
        "tests/zoo_models/market/config.json",
        "safesteer_mlx/data/refusal_phrases.txt",
        "scripts/zoo_words/ranch.yaml",
    ):
        assert (ROOT / path).is_file() and re.search(config["exclude"], path), path
    assert not re.search(config["exclude"], "safesteer_mlx/align.py")


def test_contributing_and_ruff_agree_on_the_width():
    width = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["line-length"]
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert f"Lines are up to {width} wide" in text
    assert max(map(len, text.splitlines())) <= width


# --------------------------------------------------------------------------------------------------
# The set-up behind scripts/align and scripts/test
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of what the set-up reads, in a folder whose name has a space."""
    root = tmp_path / "a check out"
    shutil.copytree(ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, root / name)
    return root


@pytest.fixture
def setup_venv(checkout, monkeypatch) -> ModuleType:
    """The checkout's set-up; making and filling .venv are replaced by a note of what was asked."""
    spec = importlib.util.spec_from_file_location("setup_venv", checkout / "scripts" / "setup_venv.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.calls = calls = []

    def call(command, lock):
        if "venv" in command:
            calls.append("venv")
            (checkout / ".venv" / "bin").mkdir()
            (checkout / ".venv" / "bin" / "python").symlink_to(sys.executable)
        else:
            assert module.mark(checkout).exists()
            calls.append(command[-1].removeprefix(str(checkout)))

    monkeypatch.setattr(module, "call", call)
    monkeypatch.setattr(module, "is_usable", lambda venv: (venv / "bin" / "python").exists())
    return module


def test_setup_makes_a_venv_once(setup_venv, checkout):
    assert not setup_venv.fits(checkout, "run")
    setup_venv.set_up(checkout, "run")
    assert setup_venv.fits(checkout, "run") and not setup_venv.fits(checkout, "dev")
    setup_venv.set_up(checkout, "run")
    assert setup_venv.calls == ["venv", "[report]"]


def test_setup_adds_the_tests_needs_and_keeps_them(setup_venv, checkout):
    setup_venv.set_up(checkout, "run")
    setup_venv.set_up(checkout, "dev")
    assert setup_venv.fits(checkout, "run") and setup_venv.fits(checkout, "dev")
    with (checkout / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert not setup_venv.fits(checkout, "run")
    setup_venv.set_up(checkout, "run")
    assert setup_venv.fits(checkout, "dev")
    assert setup_venv.calls == ["venv", "[report]", "[dev]", "[dev]"]


def test_setup_does_not_take_a_half_made_venv(setup_venv, checkout, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(setup_venv, "install", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            setup_venv.set_up(checkout, "run")
    assert not setup_venv.fits(checkout, "run")
    setup_venv.set_up(checkout, "run")
    assert setup_venv.calls == ["venv", "venv", "[report]"]
    assert setup_venv.fits(checkout, "run")


def test_setup_keeps_the_venv_when_pip_gives_up(setup_venv, checkout, monkeypatch):
    setup_venv.set_up(checkout, "run")
    (checkout / "constraints.txt").write_text("# changed\n")

    def fail(*arguments):
        raise subprocess.CalledProcessError(1, "pip")

    with monkeypatch.context() as patch:
        patch.setattr(setup_venv, "install", fail)
        with pytest.raises(subprocess.CalledProcessError):
            setup_venv.set_up(checkout, "run")
    assert not setup_venv.fits(checkout, "run")
    setup_venv.set_up(checkout, "run")
    assert setup_venv.calls == ["venv", "[report]", "[report]"]


def test_setup_follows_a_moved_checkout(setup_venv, checkout):
    setup_venv.set_up(checkout, "run")
    moved = checkout.rename(checkout.with_name("moved"))
    assert not setup_venv.fits(moved, "run")  # an editable install remembers the old folder


def test_two_setups_at_once_do_the_work_once(setup_venv, checkout, monkeypatch, capsys):
    started, done = threading.Event(), setup_venv.install

    def slow_install(*arguments):
        started.set()
        time.sleep(0.3)
        done(*arguments)

    monkeypatch.setattr(setup_venv, "install", slow_install)
    first = threading.Thread(target=setup_venv.set_up, args=(checkout, "dev"))
    first.start()
    assert started.wait(10)
    setup_venv.set_up(checkout, "dev")
    first.join()
    assert setup_venv.calls == ["venv", "[dev]"]
    assert "another set-up" in capsys.readouterr().err


@pytest.fixture
def only_on_path(tmp_path):
    """Makes an environment whose PATH has the system's tools and, of Pythons, only the given ones."""

    def environment(**pythons: str) -> dict[str, str]:
        folder = tmp_path / "bin"
        folder.mkdir()
        for tool in ("dirname", "uname"):
            found = shutil.which(tool)
            assert found
            (folder / tool).symlink_to(found)
        for name, script in pythons.items():
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)
        return {"PATH": str(folder)}

    return environment


@pytest.mark.parametrize("script", ["align", "test"])
@pytest.mark.parametrize(
    ("pythons", "words"),
    [
        ({}, "no Python 3.11 or newer"),
        ({"python3": "exit 1"}, "no Python 3.11 or newer"),
        (
            {"python3": "case $2 in *ensurepip*) exit 1;; *print*) echo 3.12;; esac"},
            "apt install python3.12-venv",
        ),
    ],
    ids=["none", "too-old", "no-ensurepip"],
)
def test_scripts_say_in_a_sentence_what_is_missing(checkout, only_on_path, script, pythons, words, tmp_path):
    done = subprocess.run(
        ["/bin/sh", checkout / "scripts" / script],
        env=only_on_path(**pythons),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert words in done.stderr and done.stderr.count("\n") == 1
    assert not (checkout / ".venv").exists()


def test_scripts_refuse_a_wrong_safesteer_python(checkout, only_on_path):
    env = only_on_path() | {"SAFESTEER_PYTHON": "/no/such/python"}
    done = subprocess.run(["/bin/sh", checkout / "scripts" / "align"], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "/no/such/python" in done.stderr and done.stderr.count("\n") == 1


def test_scripts_pass_every_argument_on_and_add_little_time(setup_venv, checkout, tmp_path):
    setup_venv.set_up(checkout, "dev")
    python = checkout / ".venv" / "bin" / "python"
    python.unlink()
    # the check is left to the real Python; what would run is printed instead
    python.write_text(f'#!/bin/sh\ncase "$*" in *--check*) exec "{sys.executable}" "$@";; esac\nprintf "<%s>" "$@"\n')
    python.chmod(0o755)
    arguments = ["a b", "", "*", "--flag='x'"]
    for script, *words in (("align", "-P", "-m", "safesteer_mlx.align"), ("test", "-m", "pytest")):
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            done = run(checkout / "scripts" / script, *arguments, cwd=tmp_path)
            seconds.append(time.perf_counter() - start)
        assert done.stdout == "".join(f"<{part}>" for part in [*words, *arguments])
        assert statistics.median(seconds) < 0.2, seconds
