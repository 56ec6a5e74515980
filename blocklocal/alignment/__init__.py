"""Feedback alignment and its relatives: other backward passes for the Linear and convolution layers of any model.

Backpropagation sends W'δ to the input of a layer with weight W, where δ is the gradient at the layer's output. These
rules send something else and keep the rest: the values of the forward pass, the weight gradient from δ and the
layer's input, and the true gradient through everything between two layers (norms, activations, pooling, sums).

    FeedbackAlignment              B'δ           B fixed and random, of the shape of W
    SignSymmetry                   (M sign W)'δ  M positive: uniform, fixed random, or drawn again for every batch
    DirectFeedbackAlignment        B'e           e the gradient of the loss at the model's output
    DirectRandomTargetProjection   B'y           y the targets

Like an optimizer, a rule is created for a model, once the model is on its device and before torch.compile, and has its
own state dict. Parameter names and the training loop stay as they are.

>>> model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
>>> x, y = torch.randn(4, 8), torch.tensor([0, 2, 1, 0])
>>> alignment = FeedbackAlignment(model, seed=0)
>>> loss = alignment.backward(x, y)  # or, as usual: criterion(model(x), y).backward()
>>> list(alignment.angles(x, y))  # degrees between the rule's gradient and the true one, per layer
['0', '2']
>>> alignment.remove()  # backpropagation again
"""

from .direct import DirectFeedbackAlignment, DirectRandomTargetProjection
from .rule import Alignment
from .weights import FeedbackAlignment, SignSymmetry

__all__ = [
    "Alignment",
    "DirectFeedbackAlignment",
    "DirectRandomTargetProjection",
    "FeedbackAlignment",
    "SignSymmetry",
]
