"""Start from a model type, swap one part at a time, and see which swaps fit and why others do not."""

import vla

base = vla.build(type="pi05", preset="tiny")
for change in ("backbone.vision=vit", "head.state=continuous", "backbone.llm=gemma_fast", "tokenizer=binning"):
    try:
        variant = vla.build(base=base, set=[change])
        print(f"{change:28} fits: {variant.frameworks()}")
    except vla.PartError as problem:
        print(f"{change:28} does not fit: {str(problem).splitlines()[1].strip()}")
