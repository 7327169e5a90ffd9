"""Bodies of the routes that load and unload adapters."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from peft_dist.api.strict import Strict


def _printable(value: str) -> str:
    if not value.isprintable():
        raise PydanticCustomError("printable", "it must hold printable characters only")
    if value != value.strip():
        raise PydanticCustomError("stripped", "it must not begin or end with a space")
    return value


Text = Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_printable)]


class LoadAdapterRequest(Strict):
    """Which adapter to load, and under which name."""

    lora_name: Text = Field(description="What requests will call the adapter in `model`.")
    lora_path: Text = Field(description="A folder on the server, or a Hub id `org/name@revision`.")
    load_inplace: bool | None = Field(None, description="Put it in the place of the adapter that has this name.")
    pinned: bool | None = Field(
        None, description="Keep it on the device until it is unloaded; null: if what it replaces is kept there."
    )


class UnloadAdapterRequest(Strict):
    """Which adapter to stop serving."""

    lora_name: Text
