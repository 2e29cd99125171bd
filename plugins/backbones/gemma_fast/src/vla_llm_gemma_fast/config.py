"""Settings of the one-expert Gemma core: the same decoder, sizes and presets as `gemma`."""

from vla_llm_gemma.config import PRESETS, Settings, needs, offers

__all__ = ["PRESETS", "Settings", "needs", "offers"]
