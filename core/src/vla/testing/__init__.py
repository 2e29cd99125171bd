"""What tests of parts need: random batches and, for plugin authors, the conformance kit."""
