"""Random stand-ins for what the paper's experiments serve: a base in the shape of Llama 2, and adapters.

    make_random.py base 7|13|70 FOLDER            # config.json alone, for --load-format dummy; prints where
    make_random.py adapters MODEL FOLDER --count N --rank R

Adapters are on all seven linears, bf16, in PEFT's format, FOLDER/adapter0 to adapterN-1; those that are there are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from bench.gpu_workload import write_adapter

SHAPES: dict[str, dict[str, Any]] = {
    "7": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "70": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """With the sizes that a config.json may leave out."""
    heads = config["num_attention_heads"]
    sizes = dict(config)
    if sizes.get("num_key_value_heads") is None:
        sizes["num_key_value_heads"] = heads
    if sizes.get("head_dim") is None:
        sizes["head_dim"] = config["hidden_size"] // heads
    return sizes


def write_base(size: str, folder: Path) -> Path:
    """``folder``/llama-2-SIZEb with config.json and nothing else; not even a tokenizer."""
    path = folder / f"llama-2-{size}b-random"
    path.mkdir(parents=True, exist_ok=True)
    config = dict(
        complete(SHAPES[size]), architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=32000,
        max_position_embeddings=4096, rms_norm_eps=1e-5, rope_theta=10000.0, hidden_act="silu",
        tie_word_embeddings=False, torch_dtype="float16", bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    (path / "config.json").write_text(json.dumps(config, indent=2))
    return path


def read_config(model: str) -> dict[str, Any]:
    """config.json of a folder or hub id. Raises SystemExit where no such adapters can be made for it."""
    path = Path(model) / "config.json"
    if not path.exists():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            path = Path(hf_hub_download(model, "config.json"))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            raise SystemExit(
                f"{model} is no folder with a config.json, and the hub gives none ({str(error).splitlines()[0]}): name "
                "a model that is here (PEFT_DIST_MODEL), or give PEFT_DIST_WEIGHTS=random without one, which fetches "
                "nothing"
            ) from error
    config: dict[str, Any] = json.loads(path.read_text())
    if config.get("model_type") not in FAMILIES:
        raise SystemExit(
            f"{model} is a {config.get('model_type')}, and random adapters are made for {', '.join(FAMILIES)}: give "
            "adapters of your own (PEFT_DIST_ADAPTERS)"
        )
    return complete(config)


def write_adapters(model: str, folder: Path, count: int, rank: int) -> None:
    missing = [i for i in range(count) if not (folder / f"adapter{i}" / "adapter_config.json").exists()]
    if missing:
        sizes = read_config(model)
        for number in missing:
            write_adapter(folder / f"adapter{number}", sizes, rank, number)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    base = kinds.add_parser("base")
    base.add_argument("size", choices=SHAPES)
    base.add_argument("folder", type=Path)
    adapters = kinds.add_parser("adapters")
    adapters.add_argument("model")
    adapters.add_argument("folder", type=Path)
    adapters.add_argument("--count", type=int, required=True)
    adapters.add_argument("--rank", type=int, default=16)
    options = parser.parse_args(argv)
    if options.kind == "base":
        print(write_base(options.size, options.folder))
    else:
        write_adapters(options.model, options.folder, options.count, options.rank)


if __name__ == "__main__":
    main(sys.argv[1:])
