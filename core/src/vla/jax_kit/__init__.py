"""The few shared pieces of maths and the policy model, in JAX. Mirror of `torch_kit`."""
