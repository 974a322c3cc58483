"""The sweep of docs/sweeps.md in PyTorch Lightning."""

import digits
import lightning as L
import pandas as pd
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

if __name__ == "__main__":
    train = DataLoader(digits.train_data(), batch_size=96, shuffle=True, drop_last=True)
    valid = DataLoader(digits.valid_data(), batch_size=96)
    rows = []
    for lr in (0.0005, 0.001, 0.002, 0.004):
        L.seed_everything(7, workers=True)
        folder, model = f"runs/sweep/lr-{lr}", digits.Digits(lr)
        trainer = L.Trainer(max_epochs=5, callbacks=[ModelCheckpoint(folder, save_last=True)])
        trainer.fit(model, train, valid, ckpt_path="last")
        rows.append({"lr": lr, **trainer.validate(model, valid)[0]})
    print(pd.DataFrame(rows).sort_values("valid/accuracy", ascending=False))
