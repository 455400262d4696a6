"""Training: the step and its guards, Adam with fused gradients, CUDA graphs, and memory estimates."""
