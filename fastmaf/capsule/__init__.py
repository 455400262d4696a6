"""The capsule workflow: images in, a trained flow, samples and an evaluation out."""
