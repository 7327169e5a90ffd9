"""The only place a Batch becomes tensors."""
