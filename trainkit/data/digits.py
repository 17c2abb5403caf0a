"""Real handwritten digits that come with scikit-learn: 1,797 images of 8 x 8 pixels (Alpaydin & Kaynak 1998, UCI)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainkit.data.pixels import Pixels, Split


@dataclass(kw_only=True, eq=False, repr=False)
class Digits(Pixels):
    """Ten classes; 70 % of each are for training, 15 % for validation, 15 % for the test, always the same ones."""

    def read(self) -> dict[str, Split]:
        from sklearn.datasets import load_digits

        pixels, targets = load_digits(return_X_y=True)  # 0 … 16, (N, 64)
        images = np.round(np.asarray(pixels) * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
        labels = np.asarray(targets, dtype=np.int64)
        # Position within its class modulo 20: the file's writers follow each other, so every part has all of them.
        turn = np.array([np.sum(labels[:i] == label) for i, label in enumerate(labels)]) % 20
        parts = {"train": turn < 14, "val": (turn >= 14) & (turn < 17), "test": turn >= 17}
        return {name: Split(images[chosen], labels[chosen]) for name, chosen in parts.items()}
