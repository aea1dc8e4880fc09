"""The namespace of the torch operators behind the backends: as operators they stay nodes of a torch.compile graph."""

import torch

LIBRARY = torch.library.Library("fastlatent", "FRAGMENT")
