"""Hostile inputs by kind: `python benchmarks/bench_hostile.py [EVERY]` runs the corpus of the suite and prints a table.

The corpus is `tests/helpers/hostile_corpus.py`; each input is opened in a forked child with limits. Before it, the time
of the search for suggestions when 60 more packages are installed.
"""

import contextlib
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests" / "helpers"), str(ROOT / "core" / "tests")]


def corpus_table(every: int) -> None:
    import torch
    from hostile import BAD, build_lab, run, warm
    from hostile_corpus import corpus

    torch.set_num_threads(1)
    found, worst = defaultdict(Counter), defaultdict(lambda: [0.0, 0])
    with tempfile.TemporaryDirectory() as folder:
        lab, room = Path(folder) / "lab", Path(folder) / "room"
        lab.mkdir(), room.mkdir()
        warm(build_lab(lab))
        for case in corpus()[::every]:
            result = run(case, lab, room)
            found[case.kind][result.outcome] += 1
            most = worst[case.kind]
            most[0], most[1] = max(most[0], result.seconds), max(most[1], result.peak)
            if result.outcome in BAD:
                print(result, file=sys.stderr)
    print("| kind | inputs | refused | used | traceback | hang | memory | outside | other | most CPU s | most MB |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    names = ("refused", "accepted", "traceback", "hang", "memory", "outside")
    for kind in [*sorted(found), "all"]:
        counts = sum(found.values(), Counter()) if kind == "all" else found[kind]
        seconds, peak = map(max, zip(*worst.values(), strict=True)) if kind == "all" else worst[kind]
        rest = sum(counts.values()) - sum(counts[name] for name in names)
        cells = [kind, sum(counts.values()), *(counts[name] for name in names), rest, f"{seconds:.1f}", peak >> 20]
        print("| " + " | ".join(map(str, cells)) + " |")


def misfit_seconds(more: int) -> tuple[float, int]:
    """CPU seconds until a misfit is explained with so many more heads installed, and how many trees were checked."""
    from vla import build, fitting, registry
    from vla.fitting import MisfitError

    source = (
        "from vla.parts import *\nPART = Part('head', '{0}', 'm', contract=CONTRACTS['head'][1], "
        "slots={{'a': ('head', 'ki')}}, offers=lambda s, i: i['a'])\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, folder)
        for number in range(more):
            name = f"more{number}"
            (Path(folder) / f"acme_{name}.py").write_text(source.format(name))
            info = Path(folder) / f"acme_{name}-1.0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: acme-{name}\nVersion: 1.0\n")
            (info / "entry_points.txt").write_text(f"[vla.heads]\n{name} = acme_{name}:PART\n")
        registry.refresh()
        for item in registry.listed("head"):
            with contextlib.suppress(Exception):
                item.load()
        tried, real = [], fitting._fits
        fitting._fits = lambda tree, spec: tried.append(1) or real(tree, spec)
        began = time.process_time()
        try:
            build(head="ki", tokenizer="fast", backbone="paligemma", preset="tiny", set=MISFIT)
        except MisfitError:
            pass
        else:
            raise AssertionError("it fits")
        finally:
            seconds = time.process_time() - began
            fitting._fits = real
            sys.path.remove(folder)
            registry.refresh()
    return seconds, len(tried)


# Nothing fits after one change: a core of one expert, and a tokenizer without action tokens.
MISFIT = {"backbone.llm": "gemma_fast", "tokenizer": "paligemma", "spec.max_token_len": 96}


def main() -> None:
    for more in (0, 60):
        seconds, tried = misfit_seconds(more)
        print(f"a misfit with {more} more packages: {seconds:.2f} s, {tried} trees checked")
    corpus_table(int(sys.argv[1]) if len(sys.argv) > 1 else 1)


if __name__ == "__main__":
    main()
