"""`python -m trainkit.report NAME`: catalogue (the tables of plugins in the README)."""

import sys

from trainkit.report import catalogue

REPORTS = {"catalogue": catalogue.main}


def main(argv: list[str]) -> int:
    if len(argv) != 1 or argv[0] not in REPORTS:
        print(f"usage: python -m trainkit.report {{{','.join(REPORTS)}}}", file=sys.stderr)
        return 2
    REPORTS[argv[0]]()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
