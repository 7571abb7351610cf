"""Scores of predictions: metrics on masks, evaluation of folders, reports to read."""
