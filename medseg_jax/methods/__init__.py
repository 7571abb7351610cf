"""What is minimised and how a prediction is made: the interface of all methods, the baseline, one file per paper."""
