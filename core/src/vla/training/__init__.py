"""Training: one loop, two engines, one config. Importing this package imports no framework."""
