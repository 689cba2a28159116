"""Recommenders: interaction data, training, ranking metrics."""
