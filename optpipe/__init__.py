"""optpipe makes a trained vision network faster on the device where it will run.

``optpipe.load(run)`` gives the optimized ``nn.Module`` of a finished run back.
"""

__version__ = "0.1.0"
