"""A fifth precision in one file: the model's matrices in bfloat16, the optimizer on float32 copies of them.

    torchrun --standalone --nproc-per-node 2 -m disttrain.launch examples/bf16_weights.py

Weights and gradients need half the memory and half the traffic of float32. Small updates are not lost, because they
add up in the copies. Vectors (biases, norms) stay in float32.
"""

import torch
from digits import config as digits

from disttrain.config import replace
from disttrain.precision import FP32


class BF16Weights(FP32):
    """Forward and backward in bfloat16, the optimizer's step in float32."""

    name = "bf16-weights"

    def __init__(self, device):
        self.device_type = torch.device(device).type

    def prepare(self, model, optimizer):
        """Give float32 copies to the optimizer and make the model bfloat16, before either is used."""
        self.pairs = []  # (the model's parameter, the optimizer's)
        for group in optimizer.param_groups:
            for i, weight in enumerate(group["params"]):
                if weight.ndim > 1:
                    group["params"][i] = torch.nn.Parameter(weight.detach().clone())
                    self.pairs.append((weight, group["params"][i]))
                    weight.data = weight.data.bfloat16()
        return model, optimizer

    def forward(self):
        return torch.autocast(self.device_type, torch.bfloat16)

    def update(self, optimizer, before_step=None):
        wanted = before_step is None or before_step() is not False  # before_step clips the model's gradients
        with torch.no_grad():
            for weight, master in self.pairs:
                master.grad, weight.grad = weight.grad.float(), None  # zero_grad clears only the copies' gradients
            stepped = wanted and super().update(optimizer)
            for weight, master in self.pairs:
                weight.copy_(master)
        return stepped

    def state_dict(self):
        return {"masters": [master.detach() for _, master in self.pairs]}

    def load_state_dict(self, state):
        for (_, master), saved in zip(self.pairs, state["masters"], strict=True):
            master.data.copy_(saved)


config = replace(digits, name="digits-bf16-weights", precision=BF16Weights)
