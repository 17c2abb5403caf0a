"""`python -m trainkit.report claims [NAME …]`: published statements, measured in miniature on this machine.

Each file of conf/experiment/claims states a claim, its arms, one grid and the seeds. Its runs lie in logs/claims; what
is finished is not run again. What they say is kept in docs/claims/<name>.json, and docs/claims.md is made of all of
them. Options: --jobs N, runs at the same time, each with one thread (default: the cores); --show, run nothing; --list.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from trainkit.launch import rundir
from trainkit.launch.process.machine import cores
from trainkit.launch.sources import CONF, RUN
from trainkit.launch.summary import clock
from trainkit.launch.versions import versions
from trainkit.report.claim import Claim, Outcome, arm, judge, read
from trainkit.report.claim_measures import Arm
from trainkit.report.claims_page import DOCS, page
from trainkit.report.collect import Run, collect

FOLDER, LOGS = CONF / "experiment" / "claims", Path("logs", "claims")


def main(argv: list[str]) -> int:
    """Returns 0 when every claim asked for was measured, 1 where runs are missing, 2 for the user's mistake."""
    known = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
    options = _parse(argv)
    unknown = [name for name in options.names if name not in known]
    if unknown:
        print(f"no such claim: {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    claims = [read(known[name]) for name in options.names or known]
    if options.list:
        for claim in claims:
            print(f"{claim.name:24} {claim.claim}")
        return 0
    missing = []
    for number, claim in enumerate(claims, start=1):
        if not options.show:
            print(f"claim {number}/{len(claims)}  {claim.name}: {claim.claim}", flush=True)
            began = time.monotonic()
            try:
                run(claim, LOGS / claim.home, options.jobs)
            except ValueError as error:
                print(error, file=sys.stderr)
                return 2
            print(f"claim {number}/{len(claims)}  {clock(time.monotonic() - began)}", flush=True)
        arms = gather(claim, LOGS / claim.home)
        if arms is None:
            missing.append(claim.name)
            continue
        outcome = judge(claim, arms)
        keep(claim, outcome, arms, DOCS / "claims" / f"{claim.name}.json", show=options.show)
        print(f"{claim.name:24} {outcome.verdict}")
    rundir.write_text(DOCS / "claims.md", page(known))
    print(DOCS / "claims.md")
    if missing:
        print(f"runs are missing of {', '.join(missing)}: python -m trainkit.report claims NAME", file=sys.stderr)
    return bool(missing)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m trainkit.report claims", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a file of conf/experiment/claims; default: all")
    parser.add_argument("--jobs", type=int, default=cores(), help="runs at the same time, each with one thread")
    parser.add_argument("--show", action="store_true", help="judge what there is and run nothing")
    parser.add_argument("--list", action="store_true", help="the names and what they claim")
    return parser.parse_args(argv)


# --- the runs ------------------------------------------------------------------------------------------------------


def words(claim: Claim, name: str, folder: Path) -> list[str]:
    """What run.py -m is told for one arm; folder: of the claim's runs."""
    values = ",".join(map(str, claim.grid[claim.key]))
    seeds = ",".join(map(str, claim.seeds))
    fixed = ["logger=none", "trainer.threads=1"]
    own = [word.replace("RUNS", str(folder)) for word in claim.arms[name]]
    return [f"experiment=claims/{claim.home}", *own, f"{claim.key}={values}", f"seed={seeds}", *fixed]


def run(claim: Claim, folder: Path, jobs: int) -> None:
    """Every arm's sweep; one that was begun goes on, one that is done is left alone.

    ValueError where the claim says something else than when its runs were made.
    """
    for name in claim.arms:
        where = folder / name
        record = rundir.read_json(where / "sweep.json").get("jobs", [])
        kept = folder / f"{name}.json"  # beside the sweep, which begins in a folder that is new or empty
        told, before = _said(claim, name, folder), rundir.read_json(kept)
        if record and before != told:
            raise ValueError(f"{claim.name} has changed since its runs in {where} were made; move that folder away")
        rundir.make(folder)
        rundir.write_json(kept, told)
        if record and all(job.get("status") == "finished" for job in record):
            continue
        place = f"sweep.resume={where}" if record else f"paths.run_dir={where}"
        command = [sys.executable, str(RUN), "-m", *words(claim, name, folder), f"sweep.jobs={jobs}", place]
        subprocess.run(command, cwd=Path.cwd(), check=False)


def _said(claim: Claim, name: str, folder: Path) -> dict[str, Any]:
    """What decides over an arm's runs: its words, and the configuration that they make."""
    from trainkit.launch.preflight import check
    from trainkit.launch.runconfig import plain

    first = [word.partition(",")[0] for word in words(claim, name, folder)]
    config = plain(check(first).configs[0])
    return {"words": words(claim, name, folder), "config": {k: v for k, v in config.items() if k != "experiment"}}


def gather(claim: Claim, folder: Path) -> dict[str, Arm] | None:
    """The arms with their runs, or None where some are still to be run."""
    found = {}
    for name in claim.arms:
        runs = collect(folder / name).runs if (folder / name / "sweep.json").is_file() else []
        found[name] = arm(name, claim.key, runs)
        wanted = product(map(str, claim.grid[claim.key]), claim.seeds)
        if not all((one := found[name].runs.get(key)) and _told_something(one) for key in wanted):
            return None
    return found


def _told_something(run: Run) -> bool:
    """Whether a run is a result: it reached its end, or its loss was no number any more. A full disk is none."""
    return run.status == "finished" or rundir.diverged(run.result)


# --- what is kept --------------------------------------------------------------------------------------------------


def keep(claim: Claim, outcome: Outcome, arms: Mapping[str, Arm], path: Path, *, show: bool = False) -> None:
    """The claim, its numbers and where they come from, as JSON; show: nothing was run on this machine today."""
    before = rundir.read_json(path)
    runs = [run for arm in arms.values() for run in arm.runs.values()]
    made = max((run.result for run in runs), key=lambda result: result.get("ended", 0.0), default={})
    record = {
        **asdict(claim),
        "outcome": asdict(outcome),
        "minutes": sum(run.seconds or 0.0 for run in runs) / 60,
        "date": time.strftime("%Y-%m-%d", time.localtime(made.get("ended", time.time()))),
        "hardware": before.get("hardware", "") if show else _hardware(),
        "versions": made.get("versions") or versions(),
    }
    rundir.make(path.parent)
    rundir.write_json(path, record)


def _hardware() -> str:
    from trainkit.bench.timing import hardware

    found = hardware()
    return f"{found['cpu']} ({found['capability']}), {found['cores']} cores"
