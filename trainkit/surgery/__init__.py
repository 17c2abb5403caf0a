"""Changing a built model: other modules in it, or another form of it with the same outputs."""

from trainkit.surgery.convert import to_pre_crms, to_pre_rms
from trainkit.surgery.fuse import fuse_norm
from trainkit.surgery.swap import swap

# The words of the key `to`.
FORMS = {"pre_rms": to_pre_rms, "pre_crms": to_pre_crms, "fused": fuse_norm}

__all__ = ["FORMS", "fuse_norm", "swap", "to_pre_crms", "to_pre_rms"]
