"""The few shared pieces of maths and the policy model, in PyTorch. `jax_kit` mirrors this folder."""
