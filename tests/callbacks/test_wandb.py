"""W&B, offline and in trouble. Each run has a process of its own, as W&B keeps a service per process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from pathlib import Path
from trainkit.launch.console import to_terminal
from trainkit.launch.wandb import WandB

{before}
logs, run_id, exit_code = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
to_terminal()
logger = WandB(
    run_dir=logs / "toy", log_dir=logs, run_id=run_id, name="toy", group="sweep", resumed={resumed}, init_timeout=2,
    config={{"optimizer": {{"lr": 0.1}}, "choices": {{"norm": "peri"}}}},
)
assert "wandb" not in sys.modules
for step, loss in ((10, 2.5), (20, 1.25)):
    logger.log_metrics({{"train/loss": loss}}, step=step)
logger.finalize("success")
logger.finish(exit_code)
print("went on")
"""


def run(tmp_path, *, before="", run_id="abc123", exit_code=0, resumed=False, **environment):
    """What the program printed; nothing may ask, so standard input is closed."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    env |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path), **environment}
    program = PROGRAM.format(before=before, resumed=resumed)
    command = [sys.executable, "-c", program, str(tmp_path / "logs"), run_id, str(exit_code)]
    (tmp_path / "logs").mkdir(exist_ok=True)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def fragments(tmp_path):
    return sorted(p for p in (tmp_path / "logs" / "wandb").iterdir() if p.is_dir() and not p.is_symlink())


def inspect(fragment):
    """The run as `wandb leet` reads it."""
    leet = shutil.which("wandb", path=str(Path(sys.executable).parent))
    done = subprocess.run([leet, "leet", "inspect", "--summary", "--json", str(fragment)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this W&B has no leet inspect --summary: {done.stderr.strip()[:80]}")
    return json.loads(done.stdout)


def test_without_a_key_the_run_is_kept_offline_and_reads_back(tmp_path):
    assert run(tmp_path) == ["went on"]
    (fragment,) = fragments(tmp_path)
    assert fragment.name.startswith("offline-run-")
    found = json.dumps(inspect(fragment))
    for part in ('"train/loss": 1.25', '"trainer/global_step": 20', "abc123", "peri"):
        assert part in found


@pytest.mark.parametrize("exit_code", [0, 1])
def test_the_state_is_how_the_run_ended(tmp_path, exit_code):
    run(tmp_path, exit_code=exit_code)
    found = inspect(fragments(tmp_path)[0])
    assert found["state"] == ("failed" if exit_code else "finished")


def test_a_continued_run_is_a_second_fragment_of_the_same_id(tmp_path):
    run(tmp_path)
    run(tmp_path, resumed=True)
    assert [path.name.rpartition("-")[2] for path in fragments(tmp_path)] == ["abc123", "abc123"]


TROUBLE = {
    "an unreachable server": {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"},
    "a key that is none": {"WANDB_API_KEY": "abc"},
}


@pytest.mark.parametrize("environment", TROUBLE.values(), ids=TROUBLE)
def test_trouble_online_means_offline_with_one_warning(tmp_path, environment):
    warning, last = run(tmp_path, **environment)
    assert warning.startswith("W&B cannot go online")
    assert warning.endswith("this run is kept offline")
    assert last == "went on"
    (fragment,) = fragments(tmp_path)
    assert fragment.name.startswith("offline-run-")


def test_a_key_in_netrc_counts(tmp_path):
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1:9 login user password {'0' * 40}\n")
    (tmp_path / "netrc").chmod(0o600)
    assert run(tmp_path, WANDB_BASE_URL="http://127.0.0.1:9")[0].startswith("W&B cannot go online")


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_the_mode_that_is_asked_for_wins_over_a_key(tmp_path, mode):
    assert run(tmp_path, WANDB_MODE=mode, WANDB_API_KEY="0" * 40) == ["went on"]
    assert (tmp_path / "logs" / "wandb").exists() == (mode == "offline")


def test_a_service_that_does_not_start_is_one_warning(tmp_path):
    broken = "import wandb.sdk.lib.service.service_process as s; s.get_core_path = lambda: '/bin/false'"
    lines = run(tmp_path, before=broken + "; [sys.modules.pop(m) for m in list(sys.modules) if m == 'wandb']")
    assert len(lines) == 2
    assert lines[0].startswith("W&B could not start")


def test_a_service_that_dies_is_one_warning(tmp_path):
    dies = (
        "import wandb; from wandb.sdk.wandb_run import Run; n = []\n"
        "def log(self, *_, **__): raise ConnectionResetError('the service is gone')\n"
        "Run.log = log; [sys.modules.pop(m) for m in list(sys.modules) if m == 'wandb']"
    )
    assert [line[:16] for line in run(tmp_path, before=dies)] == ["W&B could not lo", "went on"]
