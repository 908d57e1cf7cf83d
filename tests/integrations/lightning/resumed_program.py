"""Trains with checkpoints and is killed in the middle of an epoch: python resumed_program.py DIR"""

import os
import signal
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
warnings.simplefilter("ignore")


def main(directory: str) -> None:
    from integrations.lightning.test_lightning_resume import fit, make, saving
    from lightning.pytorch.callbacks import Callback

    class Kill(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.current_epoch == 2 and batch_idx == 3:
                os.kill(os.getpid(), signal.SIGKILL)

    torch.manual_seed(11)
    fit(make(), *saving(directory), Kill())


if __name__ == "__main__":
    main(sys.argv[1])
