"""Data sets and readers; nothing here knows a model."""
