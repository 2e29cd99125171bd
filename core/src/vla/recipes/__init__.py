"""Known configurations, one TOML file each (`vla.training.recipes`)."""
