"""Selective state-space scans: Mamba-1's `selective_scan` with five backends, and Mamba-2's `ssd`."""

from medseg_jax.ops.scan.choice import chosen_backend
from medseg_jax.ops.scan.selective import BACKENDS, selective_scan
from medseg_jax.ops.scan.ssd import ssd

__all__ = ["BACKENDS", "chosen_backend", "selective_scan", "ssd"]
