"""One thread, and the same property tests in every run."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("blocklocal", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("blocklocal")
