"""Find checkpoints of Trainer."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path


def last_complete_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """Return the newest complete checkpoint in a trainer's output folder, None if there is none.

    For ``trainer.train(resume_from_checkpoint=last_complete_checkpoint(arguments.output_dir))``
    after a run was killed; without a checkpoint, it starts at the beginning. Given True, Trainer
    takes the newest folder, and fails if the run was killed while it wrote that. It writes
    ``trainer_state.json`` last: a checkpoint where that file is whole is complete.
    """
    found = {}
    for path in Path(folder).glob("checkpoint-*"):
        if re.fullmatch(r"checkpoint-\d+", path.name):
            try:
                json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            found[int(path.name.partition("-")[2])] = str(path)
    return found[max(found)] if found else None
