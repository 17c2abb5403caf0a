"""`python -m trainkit.data shards DIR WORDS`: a text as token files, which data=stream trains on.

WORDS are those of run.py and say which text and which tokenizer:
  python -m trainkit.data shards shards/stories data=hub data.name=roneneldan/TinyStories data.tokenizer=bpe
  python -m trainkit.data shards shards/books data=text data.path='books/*.txt' --tokens 10000000
"""

import argparse
import sys
from pathlib import Path

from trainkit.launch.explain import UserError

TOKENS = 100_000_000  # 200 MB as uint16


def main(argv: list[str]) -> int:
    """Returns the exit code, 2 for the user's mistake."""
    about = __doc__ or ""
    parser = argparse.ArgumentParser(
        prog="python -m trainkit.data", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["shards"])
    parser.add_argument("folder", type=Path, metavar="DIR", help="where they are written: a new or an empty folder")
    parser.add_argument("words", nargs="*", metavar="WORDS", help="data=… data.tokenizer=…")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"per file; {TOKENS:,} unless given")
    given = parser.parse_intermixed_args(argv)
    try:
        shards(given.folder.expanduser(), given.words, given.tokens)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def shards(folder: Path, words: list[str], tokens: int) -> None:
    """Writes the text that `words` choose. Raises UserError where they choose none, or it cannot be written."""
    from trainkit.data.shards import write
    from trainkit.data.tokens import Tokens
    from trainkit.launch.console import log, to_terminal
    from trainkit.launch.job import make, mistakes
    from trainkit.launch.preflight import check

    cfg = check(words).configs[0]
    to_terminal()
    with mistakes():
        text = make(cfg, "data")
        if not isinstance(text, Tokens):
            raise UserError(f"data={cfg.choices.data} is no text that could be encoded", "try data=text data.path=…")
        write(folder, text, tokens)
    log.info("written to %s; use it by\n  python run.py data=stream data.path=%s", folder, folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
