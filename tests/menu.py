"""The menu as tests see it: what there is to choose, and plugins built from their YAML as a run would build them."""

from typing import Any

from hydra.utils import instantiate
from omegaconf import OmegaConf

from trainkit.launch.compose import compose
from trainkit.launch.sources import CONF


def options(group: str) -> list[str]:
    """The names in conf/<group>/."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def build(group: str, *overrides: str) -> Any:
    """What `python run.py <overrides>` would make of the node `group`."""
    cfg = compose([*overrides])
    for name, value in {"vocab": 64, "bytes_per_token": 1.0, "unigram_entropy": 3.0}.items():
        if name in cfg.data and cfg.data[name] is None:
            OmegaConf.update(cfg, f"data.{name}", value)
    return instantiate(cfg[group], _convert_="all")
