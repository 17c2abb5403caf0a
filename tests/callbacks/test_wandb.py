"""W&B offline and in trouble; nothing here needs a network."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import wandb
from omegaconf import OmegaConf

from trainkit.launch.wandb import WandB
from trainkit.launch.wandb_report import publish

UNREACHABLE = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """A W&B that was never used, and no keys."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()
    yield
    wandb.teardown()


def run(logs: Path, *, exit_code: int = 0, resumed: bool = False) -> None:
    """A run of two steps, from logger to finish."""
    logs.mkdir(exist_ok=True)
    logger = WandB(
        run_dir=logs / "toy", log_dir=logs, run_id="abc123", name="toy", group="sweep", resumed=resumed, init_timeout=1,
        config={"optimizer": {"lr": 0.1}, "choices": {"norm": "peri"}},
    )  # fmt: skip
    for step, loss in ((10, 2.5), (20, 1.25)):
        logger.log_metrics({"train/loss": loss}, step=step)
    logger.finalize("failed" if exit_code else "success")
    logger.finish(exit_code)
    logger.log_metrics({"train/loss": 0.0}, step=30)  # too late, and no harm


def fragments(logs: Path) -> list[Path]:
    return sorted(p for p in (logs / "wandb").iterdir() if p.is_dir() and not p.is_symlink())


def inspect(fragment: Path) -> dict:
    """The run as `wandb leet` reads it."""
    command = shutil.which("wandb", path=str(Path(sys.executable).parent))
    assert command is not None
    done = subprocess.run([command, "leet", "inspect", "--summary", "--json", fragment], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this W&B has no `leet inspect --summary`: {done.stderr.strip()[-80:]}")
    return json.loads(done.stdout)


@pytest.mark.parametrize(("exit_code", "state"), [(0, "finished"), (1, "failed")])
def test_without_a_key_the_run_is_kept_offline_and_reads_back(tmp_path, said, capfd, exit_code, state):
    run(tmp_path / "logs", exit_code=exit_code)
    assert capfd.readouterr() == ("", "")
    (fragment,) = fragments(tmp_path / "logs")
    assert fragment.name.startswith("offline-run-")
    found = inspect(fragment)
    assert found["state"] == state
    for part in ('"train/loss": 1.25', '"trainer/global_step": 20', '"abc123"', '"peri"'):
        assert part in json.dumps(found)


def test_a_continued_run_is_a_second_fragment_of_the_same_id(tmp_path, said):
    run(tmp_path / "logs")
    run(tmp_path / "logs", resumed=True)
    names = [path.name for path in fragments(tmp_path / "logs")]
    assert len(names) == 2
    assert all("-abc123" in name for name in names)


@pytest.mark.parametrize("environment", [UNREACHABLE, {"WANDB_API_KEY": "abc"}], ids=["unreachable", "no key at all"])
def test_trouble_online_means_offline_with_one_warning(tmp_path, said, capfd, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    run(tmp_path / "logs")
    (warning,) = said
    assert warning.startswith("W&B cannot go online")
    assert warning.endswith("this run is kept offline")
    assert capfd.readouterr().err == ""
    (fragment,) = fragments(tmp_path / "logs")
    assert fragment.name.startswith("offline-run-")


def test_a_key_in_netrc_counts(tmp_path, said, monkeypatch):
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1:9 login user password {'0' * 40}\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("WANDB_BASE_URL", UNREACHABLE["WANDB_BASE_URL"])
    run(tmp_path / "logs")
    assert [line[:20] for line in said] == ["W&B cannot go online"]


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_the_mode_that_is_asked_for_wins_over_a_key(tmp_path, said, monkeypatch, mode):
    for name, value in (UNREACHABLE | {"WANDB_MODE": mode}).items():
        monkeypatch.setenv(name, value)
    run(tmp_path / "logs")
    assert said == []
    assert (tmp_path / "logs" / "wandb").exists() == (mode == "offline")


def test_a_service_that_does_not_start_is_one_warning(tmp_path, said, monkeypatch):
    monkeypatch.setattr("wandb.sdk.lib.service.service_process.get_core_path", lambda: "/bin/false")
    run(tmp_path / "logs")
    assert [line[:19] for line in said] == ["W&B could not start"]


def test_a_service_that_dies_is_one_warning(tmp_path, said, monkeypatch):
    def log(*_, **__):
        raise ConnectionResetError("the service is gone")

    monkeypatch.setattr("wandb.sdk.wandb_run.Run.log", log)
    run(tmp_path / "logs")
    assert said == ["W&B could not log (the service is gone); the run goes on, metrics.jsonl has every number"]


# --- reports ------------------------------------------------------------------------------------------------------


@pytest.fixture
def sweep(tmp_path):
    """The folder of a sweep that has its report, and the configuration of a job."""
    folder = tmp_path / "logs" / "gpt" / "my sweep=ü"
    folder.mkdir(parents=True)
    for name in ("report.html", "summary.md", "summary.csv"):
        (folder / name).write_text(f"<p>{name}</p>")
    logger = {"_target_": "trainkit.launch.wandb.WandB", "_partial_": True, "project": "mine", "init_timeout": 1.0}
    return folder, OmegaConf.create({"logger": logger, "paths": {"log_dir": str(tmp_path / "logs")}})


def test_a_report_is_a_page_and_an_artifact_of_a_run_in_the_group(tmp_path, said, sweep, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder, cfg = sweep
    kept = []
    monkeypatch.setattr("wandb.sdk.wandb_run.Run.log_artifact", lambda self, artifact: kept.append((self, artifact)))
    publish(cfg, folder, folder / "report.html")
    assert said == []
    (fragment,) = fragments(tmp_path / "logs")
    (page,) = (fragment / "files").rglob("*.html")
    assert page.read_text() == "<p>report.html</p>"
    ((run, artifact),) = kept
    assert (run.project, run.group, run.job_type) == ("mine", folder.name, "report")
    assert (run.name, artifact.type) == (f"{folder.name}/report", "report")
    assert artifact.name.startswith("report-my_sweep__")
    assert sorted(artifact.manifest.entries) == ["report.html", "summary.csv", "summary.md"]


def test_a_report_that_cannot_be_uploaded_is_a_warning(said, sweep, monkeypatch):
    for name, value in UNREACHABLE.items():
        monkeypatch.setenv(name, value)

    def broken(*_):
        raise ConnectionResetError("the service is gone")

    monkeypatch.setattr("wandb.sdk.wandb_run.Run.log_artifact", broken)
    folder, cfg = sweep
    publish(cfg, folder, folder / "report.html")
    assert said[-1] == "W&B could not take the report (the service is gone); it is on disk"
