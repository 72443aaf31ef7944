"""Make .venv fit pyproject.toml and constraints.txt; run by scripts/setup, standard library only.

    setup_venv.py --check run|dev    exit 0 if it fits, 1 if not; touches nothing
    setup_venv.py run|dev            make it fit

`.venv` fits when its stamp, written last, names the level (dev includes run) and the fingerprint of
the two files and of the folder, which an editable install remembers. While pip works a second file,
the mark, lies in it: a .venv that holds the mark was left half-made and is made anew. A lock, released
by the system whatever happens to its holder, keeps two set-ups apart. What --check does not need is
imported where it is used, since that check runs before every command.
"""

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINIMUM = (3, 11)
LEVELS = {"run": "[report]", "dev": "[dev]"}  # level -> extra
NEEDED_BY = {"run": "scripts/align", "dev": "scripts/test"}


def fingerprint(root: Path) -> str:
    digest = hashlib.sha256(os.fsencode(root))
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update(b"\0" + (root / name).read_bytes())
    return digest.hexdigest()


def stamp(root: Path) -> Path:
    return root / ".venv" / "safesteer-stamp"


def mark(root: Path) -> Path:
    return root / ".venv" / "safesteer-half-made"


def level_of(root: Path) -> str | None:
    """The level that .venv was last finished at, whether or not the fingerprint still holds."""
    try:
        return stamp(root).read_text().split()[0]
    except (OSError, IndexError):
        return None


def fits(root: Path, level: str) -> bool:
    if mark(root).exists() or level_of(root) not in (level, "dev"):
        return False
    return stamp(root).read_text().split()[1:] == [fingerprint(root)]


def say(sentence: str) -> None:
    print(f"setup: {sentence}", file=sys.stderr, flush=True)


def why_unsupported() -> str | None:
    """One sentence when MLX has no wheel for this machine, so that pip need not say it worse."""
    import platform

    if sys.platform == "darwin":
        if platform.machine() != "arm64":
            return (
                f"this Python is built for {platform.machine()}, and MLX needs Apple silicon; on such a Mac "
                "install a native arm64 Python and name it in SAFESTEER_PYTHON."
            )
        release = platform.mac_ver()[0]
        if release and int(release.split(".")[0]) < 14:
            return f"this is macOS {release}, and MLX needs macOS 14 or newer."
    elif sys.platform == "linux":
        try:
            libc = os.confstr("CS_GNU_LIBC_VERSION") or ""
        except (OSError, ValueError):  # musl
            libc = ""
        name, _, version = libc.partition(" ")
        if name != "glibc" or tuple(int(part) for part in version.split(".")[:2]) < (2, 35):
            return f"this system's C library is {libc or 'not glibc'}, and MLX needs glibc 2.35 or newer."
    return None


def call(command: list[str], lock: int) -> None:
    """Run a command that keeps the lock even if this process is killed first."""
    import subprocess

    settings = ("PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT")  # would install somewhere else
    env = {name: value for name, value in os.environ.items() if name not in settings}
    subprocess.run(command, check=True, pass_fds=(lock,), env=env, stdin=subprocess.DEVNULL)


def is_usable(venv: Path) -> bool:
    import subprocess

    probe = f"import sys, pip; sys.exit(sys.version_info < {MINIMUM} or sys.prefix == sys.base_prefix)"
    try:
        done = subprocess.run([venv / "bin" / "python", "-I", "-c", probe], capture_output=True)
    except OSError:
        return False
    return done.returncode == 0


def make_venv(root: Path, lock: int) -> None:
    """An empty .venv, marked as half-made from its first moment."""
    import shutil

    venv = root / ".venv"
    if venv.is_symlink() or venv.is_file():
        venv.unlink()
    elif venv.exists():
        shutil.rmtree(venv)
    venv.mkdir()
    mark(root).touch()
    call([sys.executable, "-I", "-m", "venv", str(venv)], lock)


def install(root: Path, level: str, lock: int) -> None:
    pip = [str(root / ".venv" / "bin" / "python"), "-I", "-m", "pip", "--disable-pip-version-check"]
    what = ["-c", str(root / "constraints.txt"), "-e", f"{root}{LEVELS[level]}"]
    call([*pip, "install", "-qq", "--no-input", *what], lock)


@contextlib.contextmanager
def locked(root: Path) -> Iterator[int]:
    import fcntl

    with (root / ".venv.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up of .venv is at work; waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def set_up(root: Path, level: str) -> None:
    """Make .venv fit, one process at a time."""
    from subprocess import CalledProcessError

    with locked(root) as lock:
        if fits(root, level):  # it was the other one's work
            return
        if level_of(root) == "dev":
            level = "dev"
        if not mark(root).exists() and is_usable(root / ".venv"):
            say("bringing .venv up to date …")
            mark(root).touch()
            stamp(root).unlink(missing_ok=True)
        else:
            version = ".".join(map(str, sys.version_info[:3]))
            say(f"making .venv with Python {version}, for {NEEDED_BY[level]}; once, about a minute …")
            make_venv(root, lock)
        try:
            install(root, level, lock)
        except CalledProcessError as error:
            if error.returncode > 0:  # pip gave up by itself, which leaves whole packages only
                mark(root).unlink()
            raise

        fresh = stamp(root).with_suffix(".new")
        fresh.write_text(f"{level} {fingerprint(root)}\n")
        os.replace(fresh, stamp(root))
        mark(root).unlink()


def advise_blas() -> None:
    """MLX's Linux wheel carries the reference BLAS; safesteer_mlx loads OpenBLAS where there is one."""
    import ctypes

    if sys.platform == "linux":
        try:
            ctypes.CDLL("libopenblas.so.0")
        except OSError:
            say("MLX on the CPU is many times faster with OpenBLAS (Debian: sudo apt install libopenblas0).")


def main(argv: list[str]) -> int:
    check = argv[:1] == ["--check"]
    level = argv[-1] if argv else ""
    if level not in LEVELS or len(argv) != 1 + check:
        say(f"'{' '.join(argv)}' is not one of: {', '.join(LEVELS)}.")
        return 2
    if check:
        return 0 if fits(ROOT, level) else 1

    reason = why_unsupported()
    if reason:
        say(reason)
        return 2
    from subprocess import CalledProcessError

    try:
        set_up(ROOT, level)
    except KeyboardInterrupt:
        say("stopped; the next run starts afresh.")
        return 130
    except CalledProcessError as error:
        step = "pip could not install the packages" if "pip" in error.cmd else "the venv module failed"
        say(f"{step}; its own words are above. Once mended (the network, perhaps), run this again.")
        return 1
    except OSError as error:
        say(f"cannot write .venv: {error}; this folder must be writable and have about 1 GB free.")
        return 1
    advise_blas()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
