"""Products of activations with plain and quantized matrices."""
