"""Whether CUDA may round the inputs of float32 matrix products and convolutions to TF32: 10 bits of mantissa for speed.

*Contract*: a setting of the whole process, which starts no device; on others than CUDA it changes nothing. Of torch's
own it is off for matrix products and on for cuDNN's convolutions; here both follow one field of the Config, part of
the run because it changes bits.

*Source*: torch's note "CUDA semantics", "TensorFloat-32".
"""

import warnings

import torch


def set_tf32(enabled: bool) -> None:
    """Let CUDA compute float32 matrix products and convolutions in TF32, or see to it that it does not.

    By `allow_tf32` and not by `fp32_precision`, torch's newer names for the same: from torch 2.9 to 2.13 the older
    ones set both, while after the newer ones alone whoever reads the older (torch.compile does) gets an error.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*TF32", category=UserWarning)  # which advises the newer names
        torch.backends.cuda.matmul.allow_tf32 = enabled
        torch.backends.cudnn.allow_tf32 = enabled
