"""From files to batches: formats, geometry, the canonical data set, checks, plans, cache, pipeline, augmentation."""
