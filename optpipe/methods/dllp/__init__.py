"""Distribution-lossless pruning with uncertainty: a spike-and-slab posterior under Stein variational gradients."""
