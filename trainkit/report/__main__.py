"""`python -m trainkit.report DIR`: the report of a sweep or a run, as one HTML file. `compare RUN RUN …`: of several.

Further: catalogue (the tables of plugins in the README), claims (docs/claims.md), schedule WORDS (a drawing),
wandb_sweep WORDS (a sweep for W&B's agents).
"""

import sys
from pathlib import Path

USAGE = """\
usage: python -m trainkit.report DIR [--out FILE]                a sweep or a run: writes DIR/report.html
       python -m trainkit.report compare RUN RUN … [--out FILE]  runs side by side: writes ./report.html
       python -m trainkit.report figure DIR METRIC … [--out PNG] metrics of a sweep by step, as a picture
       python -m trainkit.report {catalogue,claims,schedule WORDS,wandb_sweep WORDS}"""


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "schedule":
        from trainkit.report import schedule

        return schedule.main(argv[1:])
    if argv[0] == "wandb_sweep":
        from trainkit.report import wandb_sweep

        return wandb_sweep.main(argv[1:])
    if argv[0] == "figure":
        from trainkit.report import sweep_figure

        return sweep_figure.main(argv[1:])
    if argv[0] == "claims":
        from trainkit.report import claims

        return claims.main(argv[1:])
    if argv == ["catalogue"]:
        from trainkit.report import catalogue

        catalogue.main()
        return 0
    if argv[0] != "compare" and not argv[0].startswith("-") and not Path(argv[0]).exists():
        print(f"{argv[0]!r} is no directory, and no command either\n{USAGE}", file=sys.stderr)
        return 2
    from trainkit.report import page

    return page.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
