"""One block trained alone, from stored activations of the border before it, and blocks put together again."""
