"""The sweep of docs/sweeps.md in PyTorch Lightning."""

import digits
import lightning as L
import pandas as pd
from lightning.pytorch.callbacks import ModelCheckpoint

if __name__ == "__main__":
    rows = []
    for lr in (0.0005, 0.001, 0.002, 0.004):
        L.seed_everything(7, workers=True)
        folder, model = f"runs/sweep/lr-{lr}", digits.Digits(lr)
        newest = ModelCheckpoint(folder, save_last=True)
        trainer = L.Trainer(max_epochs=5, callbacks=[newest], default_root_dir=folder)
        trainer.fit(model, digits.train_loader(), digits.valid_loader(), ckpt_path="last")
        rows.append({"lr": lr, **trainer.validate(model, digits.valid_loader())[0]})
    print(pd.DataFrame(rows).sort_values("valid/accuracy", ascending=False))
