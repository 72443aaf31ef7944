"""safesteer-mlx: safety alignment of chat models on Apple's MLX by localized on-policy distillation.

The method is SafeSteer (arXiv 2606.02530). `align.py` reads as its method section; every stage is a
function in a module of its own, in `method/`. Nothing heavy is imported here, so that `--help` stays quick.
"""

import os
import signal
import sys

_RANKS = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # mlx.launch's own, and those that its MPI sets


def started_rank() -> int | None:
    """Which of several processes this is that a launcher started together, from 0; None where there are no others."""
    given = next((os.environ[name] for name in _RANKS if name in os.environ), "")
    return int(given) if given.isdecimal() else None


def _stop_at_once() -> None:
    """Ctrl-C and SIGTERM before a command has begun, or after its end, are one line and its code; of processes started
    together the first alone says so.

    Only in a process that is ours: the console script's, or `python -m`'s, whose argv says so while the package is
    imported. It stands first, since what comes after takes a while. While a command works, system/screen.py decides.
    """

    def stop(number: int, _: object) -> None:
        if not started_rank():
            os.write(2, b"safesteer-mlx: interrupted\n")
        os._exit(128 + number)

    if sys.argv[:1] == ["-m"] or os.path.basename(sys.argv[0]) == "safesteer-mlx":
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, stop)


_stop_at_once()


import ctypes  # noqa: E402
from _ctypes import dlclose  # noqa: E402
from importlib import import_module  # noqa: E402
from importlib.metadata import PackageNotFoundError, version  # noqa: E402
from types import ModuleType  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

if TYPE_CHECKING:
    from .api import Aligned, Loaded, Recipe, Scores, UserError, align, evaluate, load

__all__ = ["Aligned", "Loaded", "Recipe", "Scores", "UserError", "__version__", "align", "evaluate", "load"]

try:
    __version__ = version("safesteer-mlx")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"


# MLX orders what it evaluates breadth first, at most 20 operations wide if nobody says otherwise. Narrower, it is done
# sooner with what a checkpointed block made again (docs/memory.md). Read once, at the first evaluation.
os.environ.setdefault("MLX_BFS_MAX_WIDTH", "3")


def _kernels(flags: set[str]) -> str | None:
    """OpenBLAS's name for the newest kernels that a processor with these flags has, of those it always has."""
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        return "SKYLAKEX"
    return "HASWELL" if {"avx2", "fma"} <= flags else None


def _prefer_openblas() -> None:
    """On Linux let MLX's CPU backend use the system's OpenBLAS where there is one.

    MLX's Linux wheel carries the reference BLAS; a library loaded earlier with global symbols takes
    precedence over it, and OpenBLAS multiplies float32 matrices 20 to 40 times faster. A processor newer
    than itself it takes for one of 2004 (Prescott), five times slower; it is told what that one can do.
    """
    if sys.platform != "linux" or "mlx.core" in sys.modules:
        return
    try:
        library = ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return
    kernels = _kernels(_processor_flags())
    if kernels and "OPENBLAS_CORETYPE" not in os.environ and _core(library) == b"Prescott":
        dlclose(library._handle)  # it chooses once, when it is loaded
        os.environ["OPENBLAS_CORETYPE"] = kernels
        try:
            ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
        finally:
            del os.environ["OPENBLAS_CORETYPE"]


def _core(library: ctypes.CDLL) -> bytes | None:
    """What OpenBLAS took the processor for; None where it cannot be asked."""
    if not hasattr(library, "openblas_get_corename"):
        return None
    library.openblas_get_corename.restype = ctypes.c_char_p
    return library.openblas_get_corename()


def _processor_flags() -> set[str]:
    """What the processor can do, in Linux's words; empty where that does not say."""
    try:
        with open("/proc/cpuinfo") as file:
            return next((set(line.split()) for line in file if line.startswith("flags")), set())
    except OSError:
        return set()


_prefer_openblas()


class _Command(ModuleType):
    """`safesteer_mlx.align` is a command's module and, called, the function of its name, whichever came first."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return getattr(import_module(".api", __name__), self.__name__.rpartition(".")[2])(*args, **options)


def command_module(name: str) -> None:
    """Let a command's module be called."""
    if name != "__main__":
        sys.modules[name].__class__ = _Command


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("align", "evaluate"):
        return import_module(f".{name}", __name__)
    return getattr(import_module(".api", __name__), name)
