"""Marks the package as NVIDIA's. A double of FusedAdam: its arguments and its `zero_grad`, with torch's arithmetic."""

import torch


class FusedAdam(torch.optim.AdamW):
    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-8,
        adam_w_mode=True,
        weight_decay=0.0,
        amsgrad=False,
        set_grad_none=True,
        capturable=False,
        master_weights=False,
    ):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.set_grad_none = set_grad_none

    def zero_grad(self):  # takes no set_to_none
        super().zero_grad(set_to_none=self.set_grad_none)
