"""The published run on images of capsules: synthetic data, training, sampling, evaluation, reproduction."""
