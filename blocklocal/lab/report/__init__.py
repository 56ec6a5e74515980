"""Runs as tables, plots and pages."""
