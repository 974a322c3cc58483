"""Reads handwritten digits with exported weights: a plain script, without a run.

disttrain checkpoint export --best runs/base base.safetensors
python examples/read_digits.py base.safetensors
"""

import sys

import digits
import torch
from safetensors.torch import load_file

model = digits.net().eval()
model.load_state_dict(load_file(sys.argv[1]))
images, labels = digits.valid_data().tensors
with torch.inference_mode():
    read = model(images).argmax(1)
print(
    f"{(read == labels).float().mean():.1%} of {len(labels)} digits are read right; the first are {read[:10].tolist()}"
)
