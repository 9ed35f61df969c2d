"""Activations as the next product reads them."""
