"""Borders inside a model's own forward pass, by forward hooks: any model, any inputs, on one device."""

from blocklocal.hooked.learner import Hooked

__all__ = ["Hooked"]
