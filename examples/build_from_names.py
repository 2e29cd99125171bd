"""Compose a variant from names, look at it, and write its file."""

import sys
from pathlib import Path

import vla

variant = vla.build(head="ki", tokenizer="fast", backbone="paligemma", preset="tiny")
print(variant.layout())
folder = Path(sys.argv[1] if len(sys.argv) > 1 else "my-variant")
folder.mkdir(parents=True, exist_ok=True)
(folder / "variant.toml").write_text(variant.to_toml())
print(f"wrote {folder / 'variant.toml'}; runs in {', '.join(variant.frameworks())}")
