"""The port face: this package as a process that an Erlang port drives.

``python -m tinker_custom_loss.port`` speaks the protocol of docs/protocol.md on file descriptors 3
and 4.
"""
