"""No gradient treatment."""

from torch import Tensor


class NoTreatment:
    """gradients -> {}, leaving them as they are."""

    def __call__(self, gradients: list[Tensor]) -> dict[str, Tensor]:
        return {}
