"""Communication between devices: through XLA's collectives, or in kernels that write to peers."""
