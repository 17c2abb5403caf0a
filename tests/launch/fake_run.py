"""Stands in for run.py in the tests of sweeps: starts at once and does what the word norm= says."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

words = dict(word.partition("=")[::2] for word in sys.argv[1:])
target = Path(words.get("resume") or words["paths.run_dir"])
act, seed = words.get("norm", "pre"), int(words.get("seed", 0))
sweep = json.loads((target.parent / "sweep.json").read_text())
result = {"pid": os.getpid(), "id": f"id{target.name}", "overrides": sys.argv[1:], "status": "running"}


def write(**news):
    result.update(news)
    (target / "result.json").write_text(json.dumps(result))


print("on standard output", flush=True)
if act == "mix":
    print("data.path: no such file\nname another one", file=sys.stderr)
    sys.exit(2)
if act == "peri":
    raise RuntimeError("before the run began")
if act == "output":
    os.kill(os.getpid(), 9)

seen = {
    "argv": sys.argv[1:],
    "began": time.time(),
    "status": sweep["jobs"][int(target.name)]["status"],
    "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
    "environment": dict(os.environ),
}
(target / "config.yaml").write_text("mode: train\ndata: {vocab: 16}\n")
write()
with (target / "run.log").open("a") as log:
    log.write("began\n")
if act == "post":
    with (target / "run.log").open("a") as log:
        log.write("Traceback ...\nNonFiniteLoss: the loss is nan\n")
    write(status="failed", reason="NonFiniteLoss: the loss is nan")
    print("NonFiniteLoss: the loss is nan", file=sys.stderr)
    sys.exit(1)
if act == "lns" and "resume" not in words and "PATIENT" not in os.environ:  # half done: never ends the first time
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (target / "pids").write_text(f"{os.getpid()} {worker.pid}")
    time.sleep(600)
time.sleep(float(words.get("schedule.final", 0)))
away = abs(math.log10(float(words.get("optimizer.lr", 1e-2))) + 2)  # powers of ten to the best learning rate
(target / "seen.json").write_text(json.dumps(seen | {"ended": time.time()}))
write(
    status="finished",
    metrics={"val/loss": 2.0 + seed / 10 + away / 4, "test/loss": 3.0, "lr": 0.0},
    parameters=1000,
    optimizer_state_bytes=8004,
)
