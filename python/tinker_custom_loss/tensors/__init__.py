"""The flat batch, and the arithmetic on gradients over it."""
