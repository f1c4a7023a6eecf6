"""The commands of ``python -m tinker_custom_loss``."""
