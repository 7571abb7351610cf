"""Metrics on boolean masks.

`overlap` counts voxels (Dice, IoU, precision, recall, volume); `surface` measures distances between surfaces in the
unit of the spacing, millimetres as a rule (HD, HD95, ASSD, NSD). Nothing here knows of files, label maps or classes.

Empty masks, everywhere: two empty masks agree, so scores are 1 and distances 0; where just one of them is empty, scores
are 0 and distances infinite. No metric returns NaN, so nothing can drop out of a mean unseen.
"""
