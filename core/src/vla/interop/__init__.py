"""Checkpoints of other systems: openpi, PaliGemma, LeRobot."""
