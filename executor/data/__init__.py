"""The bundled model and its texts, as files of the package."""

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent

MODEL = _FOLDER / "kjv"
PROMPTS = _FOLDER / "demo_prompts.jsonl"
# Every twentieth chapter, which the model was not trained on.
HELD_OUT = _FOLDER / "held_out.txt"
# For a chat model.
QUESTIONS = _FOLDER / "demo_questions.txt"
