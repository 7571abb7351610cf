"""Networks, one file each: a frozen config dataclass with presets, and the NNX module that it builds.

Every config has `from_plan(plan)`, which fills the fields that are None, and `build(in_channels, out_channels, rngs)`.
Every module is called as `module(x [b, *s, c], train=False, rngs=None, perturb=None)` and returns a tuple of float32
logits [b, *s, k], full resolution first; it holds parameters and batch statistics, never random state.
"""
