"""Metrics on arrays. Nothing here knows of files or classes.

    overlap      voxels: Dice, IoU, precision, recall, volume
    surface      distances between surfaces in the unit of the spacing, millimetres as a rule: HD, HD95, ASSD, NSD
    detection    lesions: F1, sensitivity, precision, false positives, panoptic quality
    cldice       centre lines: clDice
    pr           probabilities: average precision, AUPR over fixed thresholds; streaming histogram
    calibration  probabilities: ECE, MCE, Brier, NLL, reliability curve
    survival     predicted risks: Harrell's and Uno's concordance index

Empty masks, everywhere: two empty masks agree, so scores are 1 and distances 0; where just one of them is empty, scores
are 0 and distances infinite. No metric of masks returns NaN, so nothing can drop out of a mean unseen. Of probabilities
and risks some questions have no answer (precision against recall without a positive voxel, concordance without a
comparable pair): those return NaN, and whoever averages them says over how many.
"""
