"""How a checkpoint gets into a file, and out of it."""

from __future__ import annotations

from io import FileIO
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from trainkit.launch.sharded_checkpoint import filled


class InPlace(TorchCheckpointIO):
    """Writes to the very path that is asked for, through to the disk, and reads sharded checkpoints too.

    Lightning's own makes two copies in memory and the file in /tmp, where a killed process leaves it behind.
    """

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return filled(super().load_checkpoint(path, map_location, weights_only), Path(path))

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        failed: list[OSError] = []

        class Kept(FileIO):
            """torch makes a RuntimeError of what goes wrong in here."""

            def write(self, data: Any) -> int:
                try:
                    rest = memoryview(data)
                    while rest:
                        rest = rest[super().write(rest) or 0 :]
                    return len(data)
                except OSError as error:
                    failed.append(error)
                    raise

        with Kept(path, "w") as file:
            try:
                torch.save(checkpoint, file)
            except (OSError, RuntimeError) as error:
                raise (failed or [error])[0] from None
