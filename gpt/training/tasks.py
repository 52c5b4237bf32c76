"""The tasks on records, by ``objective.kind``."""

from gpt.config import TrainConfig, UsageError
from gpt.data.prompts import Records
from gpt.training import preferences
from gpt.training.preferences import Preferences
from gpt.training.records import StartModel, Write
from gpt.training.rewarded import Rewarded
from gpt.training.task import Task

FIELDS = {"dpo": preferences.FIELDS, "reward": ()}
"""The fields of a record besides its prompt, by ``objective.kind``."""


def task_of(config: TrainConfig, data: Records, *, start: StartModel, write: Write | None) -> Task:
    """The task that ``config`` asks for. ``start`` loads the start model, and ``write`` lets a
    model write texts.
    """
    if config.objective.kind == "dpo":
        return Preferences(config, data, start=start, write=write)
    if write is None:
        raise UsageError(
            "objective.kind is reward, and the caller of train() gave no function to write texts"
        )
    return Rewarded(config, data, start=start, write=write)
