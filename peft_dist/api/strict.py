"""What all bodies have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """Unknown fields are kept in ``model_extra``, where those that are known elsewhere are looked for."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
