"""Training and evaluation for captioner: data sets, feature cache, losses, the loop, metrics."""
