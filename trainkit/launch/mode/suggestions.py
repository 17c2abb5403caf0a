"""Jobs that Optuna suggests one at a time, each in the light of what the jobs before it came to (ask and tell)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainkit.launch.explain import UserError, did_you_mean, listed
from trainkit.launch.mode.hparams_search import Range, Search, entries
from trainkit.launch.summary import Job

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler


class Suggestions:
    """A study in memory. sweep.json is what is kept: a continued search tells it the jobs there again.

    The sampler then begins anew with hparams_search.seed + the number of those jobs, so that it does not draw what it
    drew before; a continued search therefore goes on otherwise than one that was never stopped. Jobs that failed or
    diverged are told as failed, which Optuna leaves out of account.
    """

    def __init__(self, search: Search, base: Sequence[str], jobs: Sequence[Job], at_once: int):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.search, self.base = search, list(base)
        self.entries = entries(search)
        self.distributions = {key: _distribution(values) for key, values in self.entries.items()}
        sampler = _sampler(search, len(jobs), at_once)
        self.study = optuna.create_study(direction=search["direction"], sampler=sampler)
        self.left: int = max(0, search["trials"] - len(jobs))
        self._asked: dict[int, Any] = {}

    def words(self, params: Mapping[str, Any]) -> list[str]:
        """The words of a job with these values."""
        return [*self.base, *(f"{key}={self.entries[key].text(params[key])}" for key in self.entries)]

    def ask(self, number: int) -> dict[str, Any]:
        """The values that job `number` is to have."""
        self.left -= 1
        trial = self._asked[number] = self.study.ask(self.distributions)
        return dict(trial.params)

    def tell(self, number: int, job: Job) -> None:
        """What a job came to. Raises UserError where it finished without the metric, as all others would."""
        from optuna.trial import TrialState, create_trial

        if job["status"] == "interrupted":
            return  # it will be gone on with
        value = self.value(job)
        state = TrialState.FAIL if value is None else TrialState.COMPLETE
        if number in self._asked:
            self.study.tell(self._asked.pop(number), value, state)
        else:
            params, known = job["params"], self.distributions
            self.study.add_trial(create_trial(state=state, value=value, params=params, distributions=known))

    def value(self, job: Job) -> float | None:
        """The metric of a finished job; None where it is no number, or the job did not finish."""
        if job["status"] != "finished":
            return None
        name, metrics = self.search["metric"], job.get("metrics", {})
        if name not in metrics:
            raise UserError(
                f"hparams_search.metric={name} is not among what a job ends with{did_you_mean(name, metrics)}",
                listed("there are", [known for known in metrics if "/" in known]),
            )
        return metrics[name] if math.isfinite(metrics[name]) else None

    def importances(self) -> dict[str, float]:
        """Which share of what separates good jobs from others is due to each key (PED-ANOVA, arXiv:2304.10255).

        Empty where too few jobs have finished to tell.
        """
        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = get_param_importances(self.study, evaluator=PedAnovaImportanceEvaluator())
        except (ValueError, RuntimeError):
            return {}
        return found if all(map(math.isfinite, found.values())) else {}


def _distribution(values: Any) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(values, Range):
        return CategoricalDistribution(values.values)
    if values.whole:
        return IntDistribution(int(values.low), int(values.high), log=values.log, step=int(values.step or 1))
    return FloatDistribution(values.low, values.high, log=values.log, step=values.step)


def _sampler(search: Search, before: int, at_once: int) -> BaseSampler:
    from optuna.samplers import RandomSampler, TPESampler

    seed = search["seed"] + before
    if search["sampler"] == "random":
        return RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna 4 calls the next argument experimental
        return TPESampler(seed=seed, constant_liar=at_once > 1)  # stay away from what is being tried at the moment
