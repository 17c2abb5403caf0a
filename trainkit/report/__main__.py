"""`python -m trainkit.report NAME`: catalogue (the tables of plugins in the README), schedule WORDS (a drawing),
wandb_sweep WORDS (a sweep for W&B's agents).
"""

import sys

from trainkit.report import catalogue, schedule, wandb_sweep


def main(argv: list[str]) -> int:
    if argv[:1] == ["schedule"]:
        return schedule.main(argv[1:])
    if argv[:1] == ["wandb_sweep"]:
        return wandb_sweep.main(argv[1:])
    if argv == ["catalogue"]:
        catalogue.main()
        return 0
    print("usage: python -m trainkit.report {catalogue,schedule WORDS,wandb_sweep WORDS}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
