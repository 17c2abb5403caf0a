"""One run, or a sweep: `python run.py model=gpt norm=peri`, `python run.py -m norm=pre,post,peri`.

The configuration is composed and checked before anything heavy is imported; then
conf -> data -> model(norm(norm_layer)) -> task -> optimizer(roles) -> schedule -> callbacks -> logger,
which trainkit/launch/job.py reads like. `python run.py --help` shows the menu.
"""

import sys

from trainkit.launch.door import enter
from trainkit.launch.explain import UserError
from trainkit.launch.process import standby
from trainkit.launch.process.launched import adopt


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 finished, 1 failed, 2 the user's mistake, 128 + n told to stop by signal n."""
    argv = standby.told(argv, "trainkit.launch.job")
    adopt()
    plan = enter(argv)
    if plan.passthrough:
        return hydra_itself()
    try:
        if plan.multirun:
            from trainkit.launch.sweep import sweep

            return sweep(plan)
        standby.start(plan.configs[0], plan.overrides[0])
        from trainkit.launch.job import execute

        execute(plan.configs[0], plan.overrides[0], plan.typed)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def hydra_itself() -> int:
    """Hydra's own flags: --cfg, --info, --hydra-help, shell completion."""
    import hydra

    from trainkit.launch.compose import register_resolvers

    register_resolvers()
    hydra.main(version_base="1.3", config_path="conf", config_name="config")(lambda cfg: None)()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
