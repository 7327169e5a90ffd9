"""Generated training and held-out rows for the demo adapters."""
