"""A tensor in a file of weights, and the error for those that nothing reads. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from profiles.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor of a file; ``offset_bytes`` counts from the start of the file.

    ``dtype`` is the format's name, such as ``BF16``. It may be unknown here.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    num_bytes: int


def refuse_unread(names: Sequence[str], *, source: str, description: str, hint: str) -> None:
    """Refuse tensors that nothing reads: without them, the results would be wrong.

    Parameters
    ----------
    names
        The tensors.
    source
        What has them, such as ``checkpoint NAME``.
    description
        What says which tensors a model has: its config, or its metadata.

    Raises
    ------
    InputError
        Where there are any.
    """
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise InputError(
            source,
            got=f"tensor {names[0]}{more}, which its {description} does not ask for",
            allowed=f"tensors of the layers and parts that its {description} describes",
            hint=hint,
        )
