"""trainer.precision=auto, by faked hardware; and that a run keeps what it began with."""

import pytest
import torch
from omegaconf import OmegaConf

from trainkit.launch.process import machine, precision
from trainkit.launch.process.precision import check_precision, choose_precision
from trainkit.launch.process.settle import settle
from trainkit.launch.runconfig import save_config
from trainkit.launch.trainer import trainer


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("flags", "chosen"),
    [
        ("fpu avx2", "32-true"),
        ("avx512f avx512_bf16", "bf16-mixed"),
        ("avx512_bf16 amx_bf16 amx_tile", "bf16-mixed"),
    ],
)
def test_a_cpu_by_its_flags(flags, chosen, monkeypatch, tmp_path, no_gpu):
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
    monkeypatch.setattr(machine, "Path", lambda _: info)
    found, why = choose_precision("auto")
    assert found == chosen
    assert ("AMX" in why) == ("amx_bf16" in flags)


def test_a_cpu_that_tells_nothing(monkeypatch, tmp_path, no_gpu):
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path / "nothing")
    assert choose_precision("cpu")[0] == "32-true"


@pytest.mark.parametrize(("capability", "chosen"), [((7, 0), "32-true"), ((8, 0), "bf16-mixed")])
def test_a_gpu_by_its_capability(capability, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    found, why = choose_precision("gpu")
    assert (found, "Some GPU" in why) == (chosen, True)
    assert choose_precision("cpu")[1].startswith("this CPU")


def test_what_no_device_has_is_refused():
    with pytest.raises(ValueError, match=r"is one of auto, .* got bf15"):
        check_precision("bf15", "gpu")
    with pytest.raises(ValueError, match="needs a GPU"):
        check_precision("16-mixed", "cpu")
    check_precision("16-mixed", "auto")


def test_the_trainer_takes_what_was_chosen(monkeypatch, no_gpu):
    monkeypatch.setattr(precision, "bfloat16_unit", lambda: "AMX")
    assert trainer(max_steps=1, accelerator="cpu").precision == "bf16-mixed"


def test_a_run_goes_on_in_the_precision_that_it_began_with(monkeypatch, tmp_path, no_gpu):
    def settings():
        return OmegaConf.create({"trainer": {"precision": "auto", "threads": None, "accelerator": "cpu"}})

    monkeypatch.setattr(precision, "bfloat16_unit", lambda: "AMX")
    cfg = settings()
    threads = torch.get_num_threads()
    try:
        assert settle(cfg, None) == ["trainer.precision=auto: bf16-mixed, this CPU has AMX"]
        assert cfg.trainer.precision == "bf16-mixed"
        save_config(cfg, tmp_path / "config.yaml")
        monkeypatch.setattr(precision, "bfloat16_unit", lambda: None)
        moved = settings()
        settle(moved, tmp_path)
        assert moved.trainer == cfg.trainer
        asked = OmegaConf.create({"trainer": {"precision": "32-true", "threads": 1, "accelerator": "cpu"}})
        assert settle(asked, tmp_path) == []
        assert asked.trainer.precision == "32-true"
    finally:
        torch.set_num_threads(threads)
