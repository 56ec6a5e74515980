"""A training run: what is trained, by which rule, and how it goes on."""
