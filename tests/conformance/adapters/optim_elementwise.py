"""Optimizers that work entry by entry, or on norms of rows and layers."""

from ..registry import File, Steps, adapter, optimizer


@adapter("Lion")
def lion(file: File) -> Steps:
    return Steps(optimizer("lion", {**file.hyperparameters, "decay": ["matrix", "vector"]}))
