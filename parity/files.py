"""Captured tensors in a file, so that two models can be compared on two machines.

    parity.save_model("reference.safetensors", parity.torch_model(module), x)     where PyTorch is
    parity.compare(parity.load_model("reference.safetensors"), parity.nnx_model(port), x)   where JAX is
"""
