"""The tinker SDK: the wrapped client, the linearization, futures."""
