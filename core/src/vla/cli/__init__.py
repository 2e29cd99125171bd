"""The console command `vla`: a table of verbs. A verb's module is imported when that verb is called.

A verb is a function of the words after it, `main(argv) -> exit status or None`, in `vla/cli/<module>.py`.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path

# verb -> (module:function, one line for `vla --help`), in the order of help
VERBS: dict[str, tuple[str, str]] = {
    "build": ("vla.cli.build:main", "compose a variant from named parts, check that they fit, write variant.toml"),
    "show": ("vla.cli.show:main", "tree, layout, attention picture, gradient routes and sizes of a variant or part"),
    "list": ("vla.cli.list:main", "parts: installed, broken, and known but not installed"),
    "fits": ("vla.cli.fits:main", "which heads, tokenizers and backbones combine"),
    "doctor": ("vla.cli.doctor:main", "import everything that is installed and report what is wrong"),
    "train": ("vla.cli.train:main", "train a variant, or fine-tune a model directory"),
    "sample": ("vla.cli.sample:main", "actions of a model for observations of a dataset"),
    "eval": ("vla.cli.eval:main", "closed-loop evaluation in an environment"),
    "serve": ("vla.cli.serve:main", "serve a policy to robots: openpi's clients connect unchanged"),
    "demo": ("vla.cli.demo:main", "the whole story on this machine: demonstrations, training, a policy that acts"),
    "record": ("vla.cli.record:main", "record demonstrations in an environment"),
    "data": ("vla.cli.data:main", "check a dataset: its files, and every pixel"),
    "stats": ("vla.cli.stats:main", "normalisation statistics of a dataset"),
    "tokenizer": ("vla.cli.tokenizer:main", "fit and inspect action tokenizers"),
    "import": ("vla.cli.import_:main", "a model directory from an openpi checkpoint"),
    "merge": ("vla.cli.merge:main", "a plain model from a base model and the adapter of a LoRA run"),
    "parity": ("vla.cli.parity:main", "compare PyTorch and JAX on the same weights, input and noise"),
    "new": ("vla.cli.new:main", "write a new plugin package"),
    "check": ("vla.cli.check:main", "run the conformance kit on an installed part"),
}


def verbs() -> dict[str, tuple[str, str]]:
    """The verbs whose module is here."""
    here = Path(__file__).parent
    return {v: row for v, row in VERBS.items() if os.path.exists(here / f"{_module(row[0])}.py")}


def _module(where: str) -> str:
    return where.partition(":")[0].rpartition(".")[2]


def usage() -> str:
    """The text of `vla --help`."""
    rows = "\n".join(f"  {verb:<10} {line}" for verb, (_, line) in verbs().items())
    return (
        "usage: vla VERB [options]\n\n"
        "Compose Vision-Language-Action policies from plugins, train them, watch them act.\n\n"
        f"verbs:\n{rows}\n\n"
        "`vla VERB --help` explains one verb; `vla --version` prints the version.\n"
        "start here:  vla build --head ki --tokenizer fast --backbone paligemma --preset tiny"
    )


def main(argv: list[str] | None = None) -> int:
    """Run one verb.

    Exit status: 0 done, 1 done with findings or without a usable result, 2 the user must change something,
    130 interrupted.
    """
    words = sys.argv[1:] if argv is None else argv
    verb = words[0] if words else "--help"
    try:
        if verb in ("--help", "-h", "help") and len(words) < 3:
            if verb == "help" and len(words) == 2:
                return main([words[1], "--help"])
            print(usage())
            return 0
        if verb in ("--version", "-V"):
            from vla import __version__

            print(f"vla {__version__}")
            return 0
        table = verbs()
        if verb not in table:
            return _unknown(verb, [*table])  # `list` is a module here, once that verb has run
        status = _run(verb, table[verb][0], words[1:])
        sys.stdout.flush()  # a reader that went away shows here, not at exit
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has what it wanted (`vla list | head`). Python would complain again while closing stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(verb: str, where: str, words: list[str]) -> int:
    from vla.errors import VlaError

    module, _, function = where.partition(":")
    try:
        return int(getattr(import_module(module), function)(words) or 0)
    except VlaError as error:
        print(f"vla {verb}: {error}", file=sys.stderr)
        return error.status
    except SystemExit as stop:  # --help, and options that do not parse
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 2
        return int(stop.code or 0)


def _unknown(verb: str, known: list[str]) -> int:
    import difflib

    close = difflib.get_close_matches(verb, known, 1)
    hint = f"did you mean {close[0]!r}?" if close else "`vla --help` says what each does"
    print(f"vla: there is no verb {verb!r}\n  expected: {', '.join(known)}\n  fix:      {hint}", file=sys.stderr)
    return 2
