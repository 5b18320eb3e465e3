"""The parity suite: every case computed by NumPy, JAX and PyTorch, and each pair compared tensor by tensor.

`cases.py` is the table. `numpy_side.py`, `jax_side.py` and `torch_side.py` compute a case from the same
inputs and return {tensor: array} in one layout: images [N, H, W, C], parameters as torchvision has them.
`compare.py` compares, and `dump.py` keeps failed cases for `python -m tests.parity replay DUMP`.
"""
