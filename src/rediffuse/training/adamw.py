"""AdamW (Loshchilov & Hutter 2019), PyTorch's, without the import of PyTorch's compiler."""

from __future__ import annotations

import inspect

import torch


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW`, bit for bit, for loops that compile no optimizer.

    Torch wraps these methods to keep its compiler out of them, and to that end imports it at their first call, which takes longer
    than importing torch.  Should torch drop the wrappers, there is nothing left to unwrap.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
