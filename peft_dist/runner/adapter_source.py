"""Where an adapter is: a local folder or a Hugging Face Hub repository."""

from __future__ import annotations

import os
import re
from pathlib import Path

from peft_dist.core.errors import AdapterError
from peft_dist.runner.adapter_files import CONFIG_NAME, PICKLE_NAME, SAFETENSORS_NAME

# Two dots would let a revision's name climb out of the Hub's cache.
_HUB_ID = re.compile(r"(?!.*\.\.)(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def resolve_adapter(
    path_or_id: str, *, root: Path | None = None, allow_hub: bool = True, allow_pickle: bool = False
) -> Path:
    """The absolute folder of an adapter, downloaded first when ``path_or_id`` is a hub id. May block for long.

    Args:
        path_or_id: A folder, or ``org/name`` or ``org/name@revision`` on the Hub. A folder that exists comes first.
        root: When given, folders are looked up in it, and folder and files must really lie inside it, whatever
            links lead to them. Hub downloads live in the Hub's cache and are not bound by it.
        allow_hub: Look on the Hub for what is no folder.
        allow_pickle: Download ``adapter_model.bin`` from a repository without safetensors.

    Raises:
        AdapterError: there is no such folder or repository, it cannot be reached or read, or it leaves ``root``.
    """
    if not path_or_id.strip():
        raise AdapterError("the adapter's path is empty: give a folder or a Hub id")
    folder = _local_folder(path_or_id) if root is None else _folder_inside(path_or_id, root)
    if folder is not None:
        return folder
    match = _HUB_ID.fullmatch(path_or_id)
    where = "" if root is None else f" in {root}"
    if match is None:
        raise AdapterError(
            f"adapter {path_or_id!r}: there is no such folder{where}, and a Hub id looks like org/name or "
            "org/name@revision: correct the path"
        )
    if not allow_hub:
        raise AdapterError(
            f"adapter {path_or_id!r}: there is no such folder{where}, and loading from the Hub is off: correct the "
            "path, or allow Hub ids with --allow-hub-load"
        )
    # The Hub's client is slow to import and reads its environment when it is.
    from peft_dist.runner.adapter_hub import download

    return download(match["repo"], match["revision"], allow_pickle)


def check_exists(path_or_id: str) -> None:
    """As far as that is known without asking the Hub, and without reading.

    Raises:
        AdapterError: as of ``resolve_adapter``, or the folder is no adapter's.
    """
    folder = None if _HUB_ID.fullmatch(path_or_id) else resolve_adapter(path_or_id)
    if folder is None or (folder / CONFIG_NAME).exists():
        return
    below = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG_NAME}"))
    if below:
        remedy = f"it holds {', '.join(below[:3])}, which have: name one of them, or serve all with --adapter-dir"
    else:
        remedy = "give the folder that PEFT's save_pretrained wrote"
    raise AdapterError(f"adapter {path_or_id!r}: there is no {CONFIG_NAME} in this folder: {remedy}")


def not_there_in_time(name: str, path_or_id: str, time_limit: float | None) -> AdapterError:
    """For whoever waited ``time_limit`` seconds for an adapter to be found and checked."""
    return AdapterError(
        f"adapter {name!r} from {path_or_id} was not there within {time_limit:g} s: see to the disk or the network, or "
        "raise adapter_load_timeout (--adapter-load-timeout)"
    )


def _local_folder(name: str) -> Path | None:
    try:
        path = Path(name).expanduser().resolve()
        return _folder_or_none(name, path)
    except AdapterError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise AdapterError(f"adapter {name!r}: the path cannot be used ({error}): correct it") from error


def _folder_or_none(name: str, path: Path) -> Path | None:
    if path.is_dir():
        return path
    if path.exists():
        raise AdapterError(f"adapter {name!r} is a file: give the folder that holds it and {CONFIG_NAME}")
    return None


def _folder_inside(name: str, root: Path) -> Path | None:
    """What is outside is refused alike whether it exists or not: the answer must not tell."""
    try:
        real_root = Path(os.path.realpath(root))
        path = _check_inside(name, real_root / name, real_root)
        for file in (CONFIG_NAME, SAFETENSORS_NAME, PICKLE_NAME):
            _check_inside(name, path / file, real_root)
        return _folder_or_none(name, path)
    except AdapterError:
        raise
    except (OSError, ValueError) as error:
        raise AdapterError(f"adapter {name!r}: the path cannot be used ({error}): correct it") from error


def _check_inside(name: str, path: Path, real_root: Path) -> Path:
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(real_root):
        raise AdapterError(
            f"adapter {name!r} leads out of the adapter folder {real_root}: put the files themselves inside it"
        )
    return real
