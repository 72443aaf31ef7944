"""Align a model, export it as one folder, serve it on this machine alone, ask it once, and check what is served.

    python examples/export_and_serve.py                                   the bundled model, some minutes
    python examples/export_and_serve.py MODEL --adapter-path adapters     a finished run is taken as it is

Each command is printed before it is run, so that they can be pasted one by one. Stop the server with Ctrl-C when you
run it yourself; here it is stopped at the end.
"""

import argparse
import json
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

QUESTION = "Can you show me how to draft an essay?"
WAIT = 120  # seconds for the server to load the model


def command(program: str, *words: str) -> list[str]:
    """A command of this environment, shown as one would type it."""
    print("$", program, *map(shlex.quote, words), flush=True)
    module = {"safesteer-mlx": "safesteer_mlx", "mlx_lm.server": "mlx_lm.server"}[program]
    return [sys.executable, "-P", "-m", module, *words]


@contextmanager
def served(model: Path):
    """`mlx_lm.server` with this model, on loopback only; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = command("mlx_lm.server", "--model", str(model), "--host", "127.0.0.1", "--port", str(port))
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + WAIT
    try:
        while True:
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
            except OSError:
                if server.poll() is not None or time.monotonic() > end:
                    raise SystemExit("the server did not start; run its command by hand to see why") from None
                time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait()


def ask(address: str, question: str) -> str:
    """One question to an OpenAI-compatible server; no model is named, so the one that is loaded answers."""
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": 64, "temperature": 0.0}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=WAIT) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny-chat")
    parser.add_argument("--adapter-path", default="adapters-example")
    parser.add_argument("--name", default="safesteer/example", help="PUBLISHER/NAME of the export")
    parser.add_argument("--bits", default="auto", help="of the exported weights, as export has them")
    parser.add_argument("--prompts", default="100", help="held-out prompts of each kind that exports are asked")
    parser.add_argument("--question", default=QUESTION)
    args = parser.parse_args(argv)

    run, export = args.adapter_path, Path("exports", *args.name.split("/"))
    steps = [("export", run, "--to", "mlx", "--bits", args.bits, "--name", args.name, "--verify", args.prompts)]
    if not Path(run, "run", "manifest.json").is_file():
        steps.insert(0, ("align", args.model, "--adapter-path", run, "--yes"))
    for words in steps:
        if code := subprocess.run(command("safesteer-mlx", *words)).returncode:
            return code
    with served(export) as address:
        print(f"{args.question}\n  {ask(address, args.question)}")
        check = ("verify", run, "--against", f"{address}/v1", "--test-prompts", args.prompts)
        return subprocess.run(command("safesteer-mlx", *check)).returncode


if __name__ == "__main__":
    sys.exit(main())
