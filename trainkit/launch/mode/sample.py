"""mode=sample: text from a trained language model, shown as it is made."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from torch import nn

from trainkit.data.sequences import Sequences
from trainkit.data.tokenizer import Bytes, Codec, load_codec
from trainkit.launch import rundir, versions
from trainkit.launch.console import log
from trainkit.launch.explain import UserError
from trainkit.launch.job import Result, build_data, build_task, mistakes
from trainkit.launch.mode.earlier import earlier
from trainkit.launch.process.settle import settle
from trainkit.launch.weights import exported, from_run
from trainkit.model.parts.generate import PROBE, Reader, looking, reads_alike, tokens_after

SHOWN = ("\n", "\t")  # control characters that a terminal may get; others could change its colours or its title
LOOK_BACK = 8  # tokens
CUT = "\ufffd"  # what decoders make of the bytes of a character that is not complete


def sample(cfg: DictConfig, overrides: list[str]) -> Result:
    """Writes sample.count texts to <run>/samples/<date>_<time>_<id>/: 1.txt, 2.txt, … and result.json.

    Each goes on from sample.prompt, or starts like a document where that is empty, for sample.tokens tokens or until
    the model ends the document. Text number i is drawn with the seed sample.seed + i - 1. UserError where the run has
    no language model, or its tokenizer does not know a character of the prompt.
    """
    settings = cfg.sample
    directory, own = earlier(cfg, overrides)
    _check_language(own, directory)
    settle(own, None)
    with mistakes():
        codec = codec_of(own, directory)
        unknown = codec.unknown(settings.prompt)
        if unknown:
            raise UserError(f"sample.prompt: the run's tokenizer does not know {', '.join(map(repr, unknown))}")
        task = build_task(own)
        from_run(task, directory, checkpoint=own.checkpoint, form=own.to)
        model = task.model.to(_device(own)).eval()
        cached = _keeps(model, own)
        target = rundir.given(cfg.paths.run_dir) if cfg.paths.run_dir else rundir.new_dir(directory, "samples")
        rundir.make(target)
        began = time.perf_counter()
        status, made = _texts(target, settings, codec, model, _context(model, own), cached=cached)
        seconds = time.perf_counter() - began
    metrics = {"sample/tokens": float(made), "sample/tokens_per_second": made / seconds, "sample/cached": float(cached)}
    result: dict[str, Any] = {"status": status, "run": str(directory), "overrides": overrides, "metrics": metrics}
    result |= {"sample": OmegaConf.to_container(settings), "ended": time.time(), "versions": versions.versions()}
    rundir.write_json(target / "result.json", result)
    log.info("%d tokens in %.1f s, %.0f per second; written to %s", made, seconds, made / seconds, target)
    return Result(target, metrics, status)


def _texts(
    target: Path, settings: DictConfig, codec: Codec, model: nn.Module, context: int, *, cached: bool
) -> tuple[str, int]:
    """Writes all texts; returns finished, or interrupted where Ctrl-C ended it, and how many tokens were drawn."""
    prompt = codec.encode(settings.prompt) or codec.separator
    start = torch.tensor([prompt], device=next(model.parameters()).device)
    options = {name: settings[name] for name in ("temperature", "top_k", "top_p")}
    texts: list[Text] = []
    try:
        for number in range(1, settings.count + 1):
            if settings.count > 1:
                log.info("--- %d of %d ---", number, settings.count)
            generator = torch.Generator().manual_seed(settings.seed + number - 1)
            tokens = tokens_after(Reader(model, context, cached=cached), start, generator, **options)
            texts.append(Text(codec, prompt))
            _write(target / f"{number}.txt", settings.prompt, texts[-1], islice(tokens, settings.tokens))
    except KeyboardInterrupt:
        return "interrupted", sum(text.count for text in texts)
    return "finished", sum(text.count for text in texts)


def codec_of(own: DictConfig, directory: Path) -> Codec:
    """The tokenizer that a run's model was trained with; its text is needed only where the tokenizer was made of it."""
    if exported(directory):
        return load_codec(directory)
    return Bytes() if own.data.get("tokenizer") == "byte" else build_data(own).codec  # type: ignore[attr-defined]


def reads_text(own: DictConfig) -> bool:
    """Whether a run's data are tokens of a text."""
    source = get_object(own.data._target_)
    return isinstance(source, type) and issubclass(source, Sequences)


def end_of_document(codec: Codec) -> int | None:
    """The token that ends a document; None where documents are separated by a blank line, which one may also hold."""
    return codec.separator[0] if len(codec.separator) == 1 and codec.decode(codec.separator).strip() else None


def _check_language(own: DictConfig, directory: Path) -> None:
    if not reads_text(own):
        raise UserError(
            f"mode=sample writes text with a language model; {str(directory)!r} was trained on "
            f"data={own.choices.get('data')}, which is no text. Train one: model=gpt data=text data.path=…"
        )


def _device(own: DictConfig) -> str:
    """Where the run itself would compute."""
    accelerated = own.trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda")
    return "cuda" if accelerated and torch.cuda.is_available() else "cpu"


def _context(model: nn.Module, own: DictConfig) -> int:
    """How many tokens the model reads at once."""
    return getattr(model, "context", own.data.context)


def _keeps(model: nn.Module, own: DictConfig) -> bool:
    """Whether keys and values of earlier tokens can be kept; if not, the terminal is told why it is slow."""
    context = _context(model, own)
    probe = torch.arange(min(PROBE, context), device=next(model.parameters()).device)
    kept = reads_alike(model, (probe * 7919 % own.data.vocab)[None], context)  # by a prime, so that the tokens differ
    if not kept:
        found = looking(model)
        reason = f"{', '.join(found)} averages over the text" if found else "the model reads a text only as a whole"
        log.info("note: %s, so all of it is read again for every token, which is slower", reason)
    return kept


def _write(path: Path, prompt: str, text: Text, tokens: Iterator[int]) -> None:
    """Shows the prompt and what the tokens add to it as they come, and writes the same to a file."""
    with path.open("w", encoding="utf-8", newline="") as file:

        def say(piece: str) -> None:
            file.write(piece)
            file.flush()
            print("".join(c if c.isprintable() or c in SHOWN else CUT for c in piece), end="", flush=True)

        try:
            say(prompt)
            for token in tokens:
                piece = text.add(token)
                if text.ended:
                    break
                say(piece)
            say(text.rest())
        finally:
            print(flush=True)


class Text:
    """Tokens to text, piece by piece: `add` returns what a token adds to those `before`, as far as it is certain.

    A token may be a part of a character, whose bytes then wait for the others; `rest` is what waits in the end. Some
    tokens are read differently at a text's beginning, so each is decoded behind the LOOK_BACK tokens before it.
    `ended`: whether the last token was the one that ends a document, which has no text. count: tokens added.
    """

    def __init__(self, codec: Codec, before: list[int]):
        self.codec, self.waiting = codec, list[int]()
        self.said = before[-LOOK_BACK:]
        self.end = end_of_document(codec)
        self.ended, self.count = False, 0

    def add(self, token: int) -> str:
        self.count += 1
        self.ended = token == self.end
        if self.ended:
            return ""
        self.waiting.append(token)
        piece = self._piece()
        if piece.endswith(CUT):
            return ""
        self.said, self.waiting = (self.said + self.waiting)[-LOOK_BACK:], []
        return piece

    def rest(self) -> str:
        return self._piece()

    def _piece(self) -> str:
        return self.codec.decode(self.said + self.waiting)[len(self.codec.decode(self.said)) :]
