"""Tasks of lm-evaluation-harness as a command names them, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from profiles.errors import InputError, one_line


class ToldTasks(TaskManager):  # type: ignore[misc]  # see executor.harness.model
    """The harness's tasks. Whatever they lack is one ``InputError``."""

    def load(self, task_list: Sequence[str], *arguments: Any, **options: Any) -> Any:
        """Load tasks and their documents."""
        try:
            return super().load(task_list, *arguments, **options)
        except Exception as error:  # of YAML, of datasets, of the network
            raise InputError(
                f"--tasks {','.join(task_list)}",
                got=one_line(f"{type(error).__name__}: {error}"),
                allowed="tasks whose documents can be read",
            ) from error


def check_tasks(tasks: Sequence[str], manager: TaskManager) -> None:
    """Refuse what is neither a task nor a file."""
    for task in tasks:
        if not manager.match_tasks([task]) and not Path(task).is_file():
            raise InputError(
                "--tasks",
                got=task or "an empty name",
                allowed="a task of lm-evaluation-harness, or a file in YAML",
                hint="python -m lm_eval ls tasks",
            )
