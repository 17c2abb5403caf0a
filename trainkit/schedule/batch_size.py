"""How the learning rate goes with the batch size (Granziol, Zohren & Roberts 2020, arXiv:2006.09092)."""

from math import sqrt

RULES = {"none": lambda ratio: 1.0, "sqrt": sqrt, "linear": lambda ratio: ratio}


def lr_factor(rule: str, batch: int, reference: int) -> float:
    """linear, for SGD: B / B₀; sqrt, for Adam and other adaptive methods: sqrt(B / B₀); none: 1.

    batch: B, samples per optimizer step; reference: B₀, the batch at which the learning rate was tuned. The rules come
    from the growth of the largest eigenvalues of the batch's Hessian, and hold while batches are small against the
    noise; beyond, the largest stable rate stops growing. The paper's abstract gives the two rules; the rest of it was
    not at hand. Raises ValueError for an unknown rule or a batch below 1.
    """
    if rule not in RULES:
        raise ValueError(f"optimizer.lr_batch_rule is {', '.join(RULES)}; got {rule!r}")
    if min(batch, reference) < 1:
        raise ValueError(f"optimizer.reference_batch is a number of samples, at least 1; got {reference}")
    return RULES[rule](batch / reference)
