"""Evaluation: metrics, baselines, plots and the report."""
