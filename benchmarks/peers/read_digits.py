"""examples/read_digits.py with a checkpoint of PyTorch Lightning."""

import sys

import torch
from digits import Digits, valid_data

model = Digits.load_from_checkpoint(sys.argv[1], map_location="cpu").eval()
images, labels = valid_data().tensors
with torch.inference_mode():
    read = model.net(images).argmax(1)
print(
    f"{(read == labels).float().mean():.1%} of {len(labels)} digits are read right; the first are {read[:10].tolist()}"
)
