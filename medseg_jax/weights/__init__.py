"""Published weights -> ours: safe readers, one key map per network (`weights/<file>.py` for `models/<file>.py`)."""

from medseg_jax.weights.mapping import KeyMap, Loaded, Rule, key_map, load, read_weights, weight_file, without_prefix

__all__ = ["KeyMap", "Loaded", "Rule", "key_map", "load", "read_weights", "weight_file", "without_prefix"]
