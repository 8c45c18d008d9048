"""The meaning of every operation in plain PyTorch: any float dtype, any device; the oracle for every kernel."""
