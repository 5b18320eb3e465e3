"""Train a ResNet with JAX or with NumPy: `python train.py --help` lists the options."""

import sys

from experiment.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
