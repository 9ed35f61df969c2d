"""The decoder's cache: keys, values and recurrent states."""
